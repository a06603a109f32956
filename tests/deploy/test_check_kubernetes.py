"""The Kubernetes files pass their check, and the check finds what would not work on a cluster."""

import shutil
from pathlib import Path

import pytest
from scripts import load_script

PROJECT = Path(__file__).resolve().parents[2]
CHECK = load_script("deploy/check_kubernetes.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT / "deploy" / "kubernetes", tmp_path / "kubernetes"))


def test_the_files_are_right() -> None:
    assert CHECK.check() == []


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("frontend.yaml", "periodSeconds: 5", "periodSecond: 5", "periodSecond"),
        ("engine.yaml", "selector: {app.kubernetes.io/name: hueshift-engine}", "selector: {a: b}", "selects None"),
        ("engine.yaml", "kind: Deployment, name: hueshift-engine", "kind: Deployment, name: other", "scales Deploy"),
        ("engine.yaml", "targetPort: metrics", "targetPort: metric", "'metric', which its pods do not have"),
        ("settings.yaml", "HUESHIFT_CLUSTER__WORKERS", "HUESHIFT_CLUSTER__WORKER", "WORKER is no setting"),
        ("settings.yaml", 'WORKERS: "2"', 'WORKERS: "many"', "cluster.workers"),
        ("settings.yaml", "name: hueshift-settings", "name: other", "reads ConfigMap/hueshift-settings"),
        ("raycluster.yaml", "hueshift-pool: finetune", "hueshift-pool: train", "has groups labelled"),
        ("raycluster.yaml", 'node-manager-port: "6380"', "labels: a=b", "labels"),
        ("raycluster.yaml", "mountPath: /data", "mountpath: /data", "mountPath"),
        ("raycluster.yaml", "groupName: serve", "group: serve", "'groupName' is a required property"),
        ("monitoring.yaml", "interval: 15s", "interval: 15", "is not of type 'string'"),
        ("monitoring.yaml", "ray.io/group: serve", "ray.io/group: server", "selects 'hueshift-ray/server'"),
        ("monitoring.yaml", "port: serve-metrics", "port: metrics", "asks port 'metrics' of 'hueshift-ray/serve'"),
        ("monitoring.yaml", "podMetricsEndpoints", "endpoints", "'endpoints' was unexpected"),
        ("monitoring.yaml", "hueshift-frontend,", "hueshift-front,", "selects 'hueshift-front'"),
        ("raycluster.yaml", "containerPort: 9464", "containerPort: 9465", "which is not 9464"),
        ("kustomization.yaml", "  - network.yaml\n", "", "kustomization.yaml lists"),
    ],
)
def test_what_is_wrong_is_found(folder: Path, file: str, before: str, after: str, said: str) -> None:
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after, 1))
    wrong = CHECK.check(folder)
    assert wrong
    assert any(said in each for each in wrong), wrong
