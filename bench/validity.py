"""Whether a suite can tell merging methods apart: probe, base, experts and the plainest merges.

    python bench/validity.py text
    python bench/validity.py vision --split validation
    python bench/validity.py text --split validation --finetune lr=1e-4 --out text-1e-4      # other experts

A valid suite has experts clearly above a linear probe of the frozen base, the base with the experts' heads below
80 % of the experts, averaging above the base, and Task Arithmetic at 0.3 at least 10 points under the experts. Whether
merges come out in their known order is told as well. To choose how experts are made, look at validation, never at test.
"""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calmerge._console import console_progress
from calmerge._run import Run
from calmerge._yaml import dump, parse
from calmerge.suites.finetune import make_experts
from calmerge.suites.prepare import prepare
from calmerge.suites.suite import SPLITS, Suite, load_suite
from calmerge.suites.validity import complaints, disorder, normalised, validity


def remade(suite: Suite, settings: Mapping[str, Any], out: Path) -> Suite:
    """The suite with experts by another recipe, in a folder of their own; base and data are the suite's."""
    data = copy.deepcopy(dict(suite.data))
    data.pop("make", None)
    data |= {"base": str(suite.base), "finetune": {**data.get("finetune", {}), **settings}}
    for name, task in data["tasks"].items():
        task |= {split: str(getattr(suite.tasks[name], split)) for split in SPLITS if split in task}
    out.mkdir(parents=True, exist_ok=True)
    (out / "suite.yaml").write_text(dump(data))
    return load_suite(out / "suite.yaml")


def setting(text: str) -> tuple[str, Any]:
    """One KEY=VALUE, the value as a suite's file has it."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got '{text}'")
    return key, parse(value, text).plain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="'text', 'vision', or the path of a suite file")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--finetune", nargs="+", type=setting, metavar="KEY=VALUE", help="how experts are made instead")
    parser.add_argument("--out", type=Path, help="where these experts are kept")
    args = parser.parse_args()
    if (args.finetune is None) != (args.out is None):
        parser.error("--finetune and --out go together")
    suite, run = load_suite(args.suite), Run(progress=console_progress())
    if args.finetune:
        prepare(suite, [], run=run)
        suite = remade(suite, dict(args.finetune), args.out)
        make_experts(suite.data, suite.folder, run=run)  # those of yet another recipe are made again
    else:
        prepare(suite, run=run)
    found = validity(suite, split=args.split, run=run)
    print(f"{'%':16s} norm. " + " ".join(f"{name[:10]:>10s}" for name in suite.tasks))
    for label, accuracy in found.items():
        shares = " ".join(f"{100 * accuracy[name]:10.1f}" for name in suite.tasks)
        print(f"{label:16s} {normalised(accuracy, found['experts']):5.1f} {shares}")
    print("\n".join(complaints(found)) or "valid")
    print("\n".join(disorder(found)) or "merges come out in their known order")


if __name__ == "__main__":
    main()
