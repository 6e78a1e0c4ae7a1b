"""Bars that show how far a long call is."""

import contextlib
from typing import Any


def progress_bar(progress: bool | None, total: int | None, label: str) -> Any:
    """A tqdm bar: None shows it in a terminal only. Something silent where tqdm is missing."""
    if progress is not False:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            disable = None if progress is None else not progress
            return tqdm(total=total, desc=label, disable=disable, leave=False)
    return _NoBar()


def is_shown(bar: Any) -> bool:
    return not getattr(bar, "disable", True)


class _NoBar(contextlib.AbstractContextManager[Any]):
    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, s: str) -> None:
        pass
