"""The README and the pages under docs/ say what is: their code runs, their links lead somewhere,
what they quote is in the source or in the results, the schemas and signatures of ops.md are the
registered ones, and the example that calls the ops runs too."""

import ast
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels._contract import OPS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "ops.md").read_text()
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RUN = [page for page in PAGES if "```python" in page.read_text()]


def blocks(language, page=PAGE):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def quoted(prefix):
    """Entries of the text blocks, {name: the rest}, each on one line."""
    lines = [line for block in blocks("text") for line in re.sub(r"\n\s+", " ", block).splitlines()]
    entries = (line.removeprefix(prefix) for line in lines if line.startswith(prefix))
    return {entry.partition("(")[0]: entry for entry in entries}


def test_schemas_are_the_registered_ones():
    registered = {name: str(getattr(torch.ops.lora_kernels, name).default._schema) for name in OPS}
    assert {k: f"lora_kernels::{v}" for k, v in quoted("lora_kernels::").items()} == registered


def test_signatures_are_those_of_the_functions():
    functions = [lora_kernels.lora_linear, lora_kernels.lora_add, lora_kernels.lora_add_]
    signatures = {
        f.__name__: f.__name__
        + re.sub(r"(torch|lora_kernels\.[\w.]+)\.", "", str(inspect.signature(f)))
        for f in functions
    }
    assert quoted("lora_kernels.") == signatures


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"{page.stem}_page.py"
    script.write_text("\n".join(blocks("python", page.read_text())))
    namespace = runpy.run_path(str(script), run_name=script.stem)
    if page.name == "ops.md":
        assert {"expected", "da", "kept", "part"} <= namespace.keys()


# --------------------------------------------------------------------- links, names and quotations


def prose(page):
    """A page's text without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def anchors(page):
    """Of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), f"{page.name}: {target}"
        assert found.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_every_public_name_is_on_one_page_of_the_api():
    written = re.findall(
        r"^::: (\S+)$", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M
    )
    assert len(written) == len(set(written))
    objects = []
    for path in written:
        module, _, name = path.rpartition(".")
        objects.append(getattr(pytest.importorskip(module), name))
    public = [getattr(lora_kernels, name) for name in lora_kernels.__all__]
    assert [one for one in public if not any(one is other for other in objects)] == []
    assert all(one.__doc__ for one in objects)


def quoted_texts():
    """The literal parts of every string of the package and of setup.py."""
    for file in [*(ROOT / "lora_kernels").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_source():
    table = re.findall(r"^\| `(.*?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(table) > 30
    texts = "\n".join(quoted_texts())
    parts = [part.strip() for message in table for part in message.split("…")]
    assert [part for part in parts if part not in texts] == []


def test_the_readme_is_short_and_its_figures_are_measured():
    assert len(README.splitlines()) < 150
    assert {"make demo", "make test"} <= {
        line.partition(" #")[0].strip() for line in README.splitlines()
    }
    performance = (DOCS / "performance.md").read_text()
    rows = re.findall(r"^\| .*\.json\) \|$", README, re.MULTILINE)
    assert rows
    for row in rows:
        (name,) = re.findall(r"\[`(\S+\.json)`\]", row)
        end = performance.index(f"\n`{name}`: ")
        table = performance[performance.rfind("\n`", 0, end) : end]
        figures = re.findall(r"\d+\.\d+×", row)
        assert figures
        assert [figure for figure in figures if figure not in table] == [], row


def test_exported_with_dynamic_rows():
    class Layer(torch.nn.Module):
        def forward(self, x, w, a, b, seed):
            return lora_kernels.lora_linear(x, w, a, b, dropout_p=0.25, seed=seed)

    x, w, a, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
    given = (x, w, a, b, torch.tensor(5))
    rows = ({0: torch.export.Dim("rows")}, None, None, None, None)
    program = torch.export.export(Layer(), given, dynamic_shapes=rows)
    assert [n.name for n in program.graph.nodes if "lora_linear" in str(n.target)] == [
        "lora_linear"
    ]
    x = torch.randn(7, 8)
    assert torch.equal(program.module()(x, *given[1:]), Layer()(x, *given[1:]))


@pytest.fixture(scope="module")
def their_library(tmp_path_factory):
    """The page's C++ block, compiled by the command under it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here (c++ on the PATH)")
    folder = tmp_path_factory.mktemp("cpp")
    (source,) = blocks("cpp")
    (folder / "their.cpp").write_text(source)
    (command,) = re.findall(r"^    (c\+\+ .*(?:\n        .*)*)", PAGE, re.MULTILINE)
    command = command.replace("\\\n", " ").replace("TORCH/", f"{Path(torch.__file__).parent}/")
    result = subprocess.run(
        shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    torch.ops.load_library(folder / "their.so")
    return torch.ops.their_library


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_called_from_cpp(their_library, dtype, p):
    shapes = ((130, 40), (24, 40), (3, 40), (24, 3))
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    dy = torch.randn(130, 24, dtype=dtype)
    seed = torch.tensor(5) if p else None
    y = their_library.project(*tensors, 2.0, p, seed)
    expected = lora_kernels.lora_linear(*tensors, scaling=2.0, dropout_p=p, seed=seed)
    assert torch.equal(y, expected)
    for one, two in zip(
        torch.autograd.grad(y, tensors, dy),
        torch.autograd.grad(expected, tensors, dy),
        strict=True,
    ):
        assert torch.equal(one, two)
    with torch.inference_mode():
        assert torch.equal(their_library.project(*tensors, 2.0, p, seed), expected)


def test_called_from_cpp_in_several_threads(their_library):
    """Each thread's calls, some of them refused, are its own."""

    def calls(index):
        generator = torch.Generator().manual_seed(index)
        shapes = ((9, 16), (8, 16), (2, 16), (8, 2))
        for _ in range(50):
            x, weight, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
            with pytest.raises(RuntimeError, match="lora_kernels::lora_linear"):
                their_library.project(x, weight, a, b[:-1], 1.0, 0.0, None)
            y = their_library.project(x, weight, a, b, 1.0, 0.0, None)
            assert torch.equal(y, lora_kernels.lora_linear(x, weight, a, b))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(calls, range(4)))


def test_bad_input_from_cpp_is_refused(their_library):
    x, weight, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(5, 3)
    for p, seed in ((0.0, None), (0.5, None), (1.0, torch.tensor(5))):
        lora_b = b if p == 0 else b[:4]
        with pytest.raises(RuntimeError, match="lora_kernels::lora_linear"):
            their_library.project(x, weight, a, lora_b, 1.0, p, seed)
    assert their_library.project(x, weight, a, b[:4], 1.0, 0.0, None).shape == (2, 4)


def test_example_that_calls_the_ops(capsys):
    main = runpy.run_path(str(ROOT / "examples" / "call_the_ops.py"))["main"]
    main(["--compile-backend", "aot_eager"])
    out = capsys.readouterr().out
    for words in ("Linear, with dropout, raw op", "Int8Linear, compiled", "lora_add_: in place"):
        assert words in out
