"""The bill of materials: requirements.txt as CycloneDX, with licences and who needs whom; checked before it is written.

cyclonedx-py reads names, versions, purls and hashes from the lock. It knows nothing of licences there (README's table
does, and .ci/check.py compares that with what the packages state), nor of the `# via` lines.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from check import licences_listed, pins
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

LOCK = "requirements.txt"


def main(target: Path) -> int:
    bill = with_licences_and_needs(read_lock())
    text = json.dumps(bill, indent=2) + "\n"
    problems = [*missing_or_more(bill), *against_the_schema(text)]
    for problem in problems:
        print(f"sbom: {problem}", file=sys.stderr)
    if problems:
        return 1
    target.write_text(text, encoding="utf-8")
    print(f"{target}: CycloneDX {bill['specVersion']}, {len(bill['components'])} components")
    return 0


def read_lock() -> dict[str, Any]:
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", LOCK, "--pyproject", "pyproject.toml"]
    command += ["--mc-type", "application", "--spec-version", "1.6", "--output-reproducible"]
    # stderr holds its advice that the graph of needs is incomplete, which it is not when we are done.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


def with_licences_and_needs(bill: dict[str, Any]) -> dict[str, Any]:
    licences = licences_listed()
    references = {each["name"]: each["bom-ref"] for each in bill["components"]}
    root = bill["metadata"]["component"]["bom-ref"]
    needs: dict[str, list[str]] = {root: [], **{reference: [] for reference in references.values()}}
    for component in bill["components"]:
        del component["description"]  # the whole entry of the lock once more
        if component["name"] in licences:
            component["licenses"] = [{"expression": licences[component["name"]], "acknowledgement": "declared"}]
        for name in needed_by(component["name"]):
            needs[root if name == "-r requirements.in" else references[name]].append(component["bom-ref"])
    bill["dependencies"] = [{"ref": one, "dependsOn": sorted(others)} for one, others in needs.items()]
    return bill


def needed_by(name: str) -> list[str]:
    """What the lock says after `# via`: names of packages, or the file that asks for it."""
    entry = re.search(rf"^{re.escape(name)}(?:\[.*?\])?==.*(?:\n    .*)*", Path(LOCK).read_text(), re.MULTILINE)
    told = re.findall(r"^    # (?:via )?(?:  )?(\S.*)$", entry[0], re.MULTILINE) if entry else []
    return [each for each in told if each != "via"]


def missing_or_more(bill: dict[str, Any]) -> list[str]:
    wanted = {f"pkg:pypi/{name}@{version}" for name, version in pins(LOCK).items()}
    listed = [each["purl"] for each in bill["components"]]
    unlike = wanted.symmetric_difference(listed)
    bare = [each["name"] for each in bill["components"] if not each.get("licenses") or not hashes(each)]
    return [
        *(f"{purl} is not in both, {LOCK} and the bill" for purl in sorted(unlike)),
        *(f"{name} has no licence or no hash" for name in bare),
        *([f"of {len(listed)} components some are listed twice"] if len(set(listed)) < len(listed) else []),
    ]


def hashes(component: dict[str, Any]) -> list[str]:
    return [each["content"] for link in component.get("externalReferences", []) for each in link.get("hashes", [])]


def against_the_schema(text: str) -> list[str]:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return [] if error is None else [f"not valid: {error}"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
