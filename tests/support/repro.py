"""Run one case on every backend of this machine: python -m tests.support.repro '<json that a failure printed>'."""

import sys

from tests.support import acceptance
from tests.support.cases import Case, build
from tests.support.targets import local_targets


def main(text: str) -> None:
    """Print each backend's errors, or what broke the acceptance rule."""
    case = Case.of(text)
    for target in local_targets():
        if not target.accepts(case):
            print(f"{target}: refuses")
            continue
        problem = build(case, target.device)
        try:
            print(f"{target}: {acceptance.check(problem, *target.run(problem))}")
        except AssertionError as failure:
            print(f"{target}: FAILS {failure}")


if __name__ == "__main__":
    main(sys.argv[1])
