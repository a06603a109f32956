"""Check the deployment files without a container engine (part of `make lint`).

The Dockerfile goes through hadolint, the compose file through the Compose specification's own schema, the Kubernetes
files through check_kubernetes.py, every YAML file through yamllint; rules may only name metrics that the server has.
promtool checks the rules too where it is installed, and its absence is said.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from prometheus_client import CollectorRegistry

from hueshift.server.metrics import Metrics

DEPLOY = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
YAMLLINT = (
    "{extends: default, rules: {line-length: {max: 120}, document-start: disable, braces: {max-spaces-inside: 1}}}"
)


def run_tool(*command: str) -> bool:
    """Run a checker and say its verdict."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stdout.write(f"{'ok  ' if result.returncode == 0 else 'FAIL'} {Path(command[0]).name} {command[-1]}\n")
    if result.returncode != 0:
        sys.stdout.write(result.stdout + result.stderr)
    return result.returncode == 0


def check_metric_names(files: list[Path]) -> bool:
    """Compare the metric names in rules with those the server exports."""
    registry = CollectorRegistry()
    Metrics(registry)
    known: set[str] = set()
    for family in registry.collect():
        suffixes = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
            "info": ("_info",),
        }.get(family.type, ("",))
        known.update(family.name + suffix for suffix in suffixes)
    good = True
    for file in files:
        unknown = sorted(set(re.findall(r"\bhueshift_[a-z_]+\b", file.read_text(encoding="utf-8"))) - known)
        sys.stdout.write(f"{'FAIL' if unknown else 'ok  '} metric names {file.name} {unknown or ''}\n")
        good = good and not unknown
    return good


def check_copied_folders() -> bool:
    """Compare the folders that the wheel is made of with those that the image copies in."""
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    copied = set(
        re.findall(r"^COPY (\w+) \1$", (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    kept = set(re.findall(r"^!(\w+)$", (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    missing = sorted(needed - (copied & kept))
    sys.stdout.write(f"{'FAIL' if missing else 'ok  '} folders of the image {missing or ''}\n")
    return not missing


def main() -> int:
    """Run every check; 0 if all passed."""
    yaml_files = sorted(DEPLOY.rglob("*.yaml"))
    rules = DEPLOY / "prometheus" / "alerts.yaml"
    verdicts = [
        run_tool(str(BIN / "hadolint"), str(DEPLOY.parent / "Dockerfile")),
        run_tool(
            str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")
        ),
        *(run_tool(str(BIN / "yamllint"), "-d", YAMLLINT, str(file)) for file in yaml_files),
        run_tool(sys.executable, "-P", str(DEPLOY / "check_kubernetes.py")),
        check_copied_folders(),
        check_metric_names([rules, *(DEPLOY / "kubernetes").glob("[ce]*.yaml"), *DEPLOY.glob("grafana/*.json")]),
    ]
    promtool = shutil.which("promtool")
    if promtool is None:
        sys.stdout.write("skip promtool: it is not installed (Debian package: prometheus)\n")
    else:
        verdicts.append(run_tool(promtool, "check", "rules", str(rules)))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
