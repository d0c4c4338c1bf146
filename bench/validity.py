"""Whether a suite can tell merging methods apart: probe, base, experts and the plainest merges.

    python bench/validity.py text
    python bench/validity.py vision --split validation

A valid suite has experts clearly above a linear probe of the frozen base, the base with the experts' heads below
80 % of the experts, averaging above the base, and Task Arithmetic at 0.3 at least 10 points under the experts.
"""

import argparse

from calmerge.suites.prepare import prepare
from calmerge.suites.suite import load_suite
from calmerge.suites.validity import complaints, normalised, validity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", help="'text', 'vision', or the path of a suite file")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    args = parser.parse_args()
    suite = load_suite(args.suite)
    prepare(suite)
    found = validity(suite, split=args.split)
    print(f"{'%':16s} norm. " + " ".join(f"{name[:10]:>10s}" for name in suite.tasks))
    for label, accuracy in found.items():
        shares = " ".join(f"{100 * accuracy[name]:10.1f}" for name in suite.tasks)
        print(f"{label:16s} {normalised(accuracy, found['experts']):5.1f} {shares}")
    print("\n".join(complaints(found)) or "valid")


if __name__ == "__main__":
    main()
