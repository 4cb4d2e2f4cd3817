"""Write docs/reference/reference.md: the keys of the package's TOML sections, strategies and importances, from source.

    python scripts/make_reference.py [--output FILE]

The meaning of a key is the string beneath it in its dataclass; that of a strategy or importance is the first paragraph
of its function's docstring. The parameters of flavors are counted on models without storage.
tests/unit/docs/test_reference_page.py fails if the file in the repository differs.
"""

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import titan_attent.titan.patches.compat  # noqa: F401

import torch
from torch import nn
from torchtitan.config import JobConfig as StockConfig

from titan_attent.data.io.atomic import write_atomically
from titan_attent.job_config import JobConfig
from titan_attent.systems.teaching.importance import IMPORTANCES
from titan_attent.systems.teaching.strategies import STRATEGIES
from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.models.flavors import FOLLOWS_DATA, VOCABULARY_MULTIPLE
from titan_attent.titan.train_spec import attent_spec

PATH = Path(__file__).parents[1] / "docs" / "reference" / "reference.md"

HEAD = """# Reference

Every key that the package adds to a torchtitan TOML, its values, and the modules that refuse bad ones. This page is
written by `python scripts/make_reference.py` from the code; change it there.

torchtitan's own keys keep their meaning. `--section.key value` on the command line overrides the TOML.
"""

UNIFORM = (
    "Trains on everything, always: torchtitan's own loss and step, bit for bit. The control. The teacher sets only the "
    "order."
)

FLAVORS = f"""## Flavors

Values of `model.flavor` for text. Parameters are in millions, without the embeddings and the output, which have
vocabulary x width parameters each (a tied model has them once). Those of image models: [images](../guide/vision.md).

The vocabulary "of the data" has as many ids as the data's tokenizer, rounded up to a multiple of {VOCABULARY_MULTIPLE};
the log says how many. A flavor with a number keeps it, unless the tokenizer has more ids; then its vocabulary follows
the data, too. A checkpoint of another vocabulary is refused.

Where the last column says so, `NAME_flex` is the same model with flex attention, for `data.document_mask`.

A flavor of your own: a module on PYTHONPATH that `experimental.custom_import` names.

```python
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

llama3_args["mine"] = TransformerModelArgs(dim=512, n_layers=8, n_heads=8, vocab_size={FOLLOWS_DATA})  # of the data
```
"""

REFUSALS = {
    "an unknown key or section in the TOML": "titan/checks/toml_checks.py",
    "data, checkpoints and batches that do not fit": "titan/checks/preflight.py",
    "a value of torchtitan's keys that it accepts silently: types, ranges, keys that exclude each other": (
        "titan/checks/value_checks.py"
    ),
    "a value that torchtitan 0.2.2 would refuse itself, later and on every rank": "titan/checks/torchtitan_ranges.py",
    "parallelisms that torchtitan 0.2.2 cannot combine, or trains wrongly ([table](status.md#parallelism))": (
        "titan/checks/parallelism.py"
    ),
    "a value of `[teacher]`": "systems/teaching/config.py",
    "a parallelism, a data set or reference losses that the teacher cannot work with": "systems/teaching/checks.py",
    "a value of `[freezing]`": "systems/freezing/config.py",
    "a parallelism or a model whose modules cannot be probed or frozen": "systems/freezing/system.py",
    "a value of `[distillation]`": "systems/distillation/config.py",
    "a source of another tokenizer, or with too few checkpoints": "systems/distillation/checks.py",
    "a value of `[highway]`": "systems/highway/config.py",
    "a parallelism or a model that Highway backpropagation cannot work with": "systems/highway/checks.py",
    "a scoring of the wrong checkpoint, or into a folder of another scoring": "titan/scoring/checkpoint_checks.py",
    "a damaged, truncated or swapped shard": "data/text/shards.py",
}

TAIL = """
## Refusals

A mistake ends the run before the first step, on all ranks, with exit code 2 and one message: what is wrong, where, and
how to fix it.

| what is refused | where |
|---|---|
"""


def cell(text: str) -> str:
    """A docstring as one cell of a Markdown table: one line per paragraph and list item."""
    lines: list[str] = []
    for line in textwrap.dedent(text).strip().splitlines():
        if lines and line.strip() and not line.lstrip().startswith("- "):
            lines[-1] += " " + line.strip()
        elif line.strip():
            lines.append(line.strip())
    text = "<br>".join(re.sub(r"^- ", "&bull; ", line) for line in lines)
    return text.replace("``", "`").replace("|", "\\|")


def documented(section: type) -> dict[str, str]:
    """Key -> the string beneath it in its dataclass."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(section)).body if isinstance(node, ast.ClassDef))
    meanings = {}
    for node, following in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), node.target.id
            meanings[node.target.id] = inspect.cleandoc(str(following.value.value))
    return meanings


def keys(name: str, section: type) -> str:
    """The part of the page on one section."""
    defaults, meanings = section(), documented(section)
    rows = []
    for key in fields(section):
        value = getattr(defaults, key.name)
        shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')
        rows.append(f"| `{key.name}` | `{shown}` | {cell(meanings[key.name])} |")
    source = Path(inspect.getsourcefile(section) or "").relative_to(PATH.parents[2]).as_posix()
    where = f"Declared in [`{source}`](../../{source})."
    return "\n".join([f"## [{name}]", "", where, "", "| key | default | meaning |", "|---|---|---|", *rows])


def functions(title: str, words: str, functions: Mapping[str, Callable[..., Any]], first: tuple[str, ...] = ()) -> str:
    """The part of the page on functions that are values of a key."""
    firsts = {name: (inspect.getdoc(function) or "").split("\n\n")[0] for name, function in functions.items()}
    rows = [f"| `{name}` | {cell(words)} |" for name, words in firsts.items()]
    return "\n".join([f"## {title}", "", words, "", "| value | what it is |", "|---|---|", *first, *rows])


def num_parameters(model: nn.Module) -> int:
    """The number of parameters, without those that have a row per token id."""
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name not in ("tok_embeddings.weight", "output.weight")
    )


def flavors() -> str:
    """The part of the page on the flavors of text models."""
    rows = []
    for family in FAMILIES.values():
        if family.modality.is_of_images:
            continue
        spec = attent_spec(f"{family.name}_attent")
        for name, args in spec.model_args.items():
            sizes: Any = args
            if name.removesuffix("_flex") != name and vars(args).get("attn_mask_type") == "causal":
                continue  # a twin
            vocabulary = f"{sizes.vocab_size:,}" if sizes.vocab_size != FOLLOWS_DATA else "of the data"
            sizes.vocab_size = sizes.vocab_size or VOCABULARY_MULTIPLE
            sizes.update_from_config(StockConfig())
            with torch.device("meta"):
                model = cast(nn.Module, spec.model_cls(args))
            millions = num_parameters(model) / 1e6
            shown = f"{millions:,.1f}" if millions < 100 else f"{millions:,.0f}"
            twin = "yes" if f"{name}_flex" in spec.model_args and sizes.attn_type == "sdpa" else ""
            rows.append(
                f"| `{family.name}_attent` | `{name}` | {shown} | {sizes.n_layers} | {sizes.dim:,} | {vocabulary} | "
                f"{twin} |"
            )
    columns = "| model | flavor | parameters (M) | layers | width | vocabulary | `_flex` |"
    return "\n".join([FLAVORS, columns, "|---|---|---|---|---|---|---|", *rows])


def reference() -> str:
    """The whole page."""
    parts = [HEAD.strip()]
    parts += [keys(section.name, section.type) for section in fields(JobConfig)]  # type: ignore[arg-type]
    strategies = "Values of `teacher.strategy`: which examples a round trains on, and with what weights."
    parts.append(functions("Strategies", strategies, STRATEGIES, (f"| `uniform` | {UNIFORM} |",)))
    importances = "Values of `teacher.importance`: the number by which examples are selected."
    parts.append(functions("Importances", importances, IMPORTANCES))
    parts.append(flavors())
    refusals = [f"| {what} | [`{where}`](../../titan_attent/{where}) |" for what, where in REFUSALS.items()]
    parts.append("\n".join([TAIL.strip(), *refusals]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the reference of keys, strategies and importances.")
    parser.add_argument("--output", type=Path, default=PATH)
    write_atomically(parser.parse_args().output, reference().encode())


if __name__ == "__main__":
    main()
