"""Where the ops are registered: in the namespace that is of this build alone."""

from ._ops import add_op_namespace_prefix as qualified
from ._ops import ops

NAMESPACE = qualified("").removesuffix("::")
__all__ = ["NAMESPACE", "ops", "qualified"]
