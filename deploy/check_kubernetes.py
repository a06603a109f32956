"""Check the Kubernetes files without a cluster (part of `make lint`, through check.py).

Kubernetes' own objects go through its schemas, strictly; RayCluster and Prometheus' monitors through the schemas kept
beside them, and the pods inside a RayCluster through Kubernetes' own. Then what no schema knows: that every file is in
the kustomization, that selectors, ports and names meet, that every container's settings are settings of this server.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema
import kubernetes_validate
import yaml

from hueshift.adapters.errors import HueshiftError
from hueshift.server.cluster.placement import Pool
from hueshift.server.settings import Settings, load_settings

FOLDER = Path(__file__).resolve().parent / "kubernetes"
VERSION = "1.33"
SCHEMAS = {
    "RayCluster": "raycluster.json",
    "ServiceMonitor": "servicemonitor.json",
    "PodMonitor": "podmonitor.json",
}
# Not applied: the kustomization itself, and values for another program's chart.
ASIDE = ("kustomization.yaml", "custom-metrics.yaml")
NAME = "app.kubernetes.io/name"
Object = Mapping[str, Any]


def read(folder: Path) -> dict[str, list[Object]]:
    """Return the objects of every file by the file's name."""
    return {
        file.name: [found for found in yaml.safe_load_all(file.read_text(encoding="utf-8")) if found]
        for file in sorted(folder.glob("*.yaml"))
    }


def check(folder: Path = FOLDER) -> list[str]:
    """Return what is wrong with the files, as sentences."""
    files = read(folder)
    (kustomization,) = files["kustomization.yaml"]
    applied = {name: found for name, found in files.items() if name not in ASIDE}
    objects = [each for found in applied.values() for each in found]
    wrong = []
    if set(kustomization["resources"]) != set(applied):
        wrong.append(f"kustomization.yaml lists {kustomization['resources']}, the folder holds {sorted(applied)}")
    for name, found in applied.items():
        for each in found:
            wrong += [f"{name} {each['kind']}/{each['metadata']['name']}: {text}" for text in schema_errors(each)]
    return [
        *wrong,
        *reference_errors(objects),
        *settings_errors(objects),
        *pool_errors(objects),
        *monitor_errors(objects),
    ]


def schema_errors(each: Object) -> Iterator[str]:
    """Yield what the schemas say of one object."""
    if each["kind"] not in SCHEMAS:
        yield from _kubernetes_errors(each)
        return
    schema = json.loads((FOLDER / "schemas" / SCHEMAS[each["kind"]]).read_text(encoding="utf-8"))
    for error in jsonschema.Draft202012Validator(schema).iter_errors(each):
        yield f"{error.json_path}: {error.message}"
    for place, template in pod_templates(each):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template.get("spec", {})}
        for text in _kubernetes_errors(pod):
            yield f"{place}: {text}"


def pod_templates(each: Object) -> Iterator[tuple[str, Object]]:
    """Yield the pods that an object makes, and where they are described."""
    spec = each.get("spec", {})
    if "template" in spec:
        yield "template", spec["template"]
    for group in [spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", [])]:
        if isinstance(group, Mapping) and isinstance(group.get("template"), Mapping):
            yield str(group.get("groupName", "head")), group["template"]


def reference_errors(objects: list[Object]) -> Iterator[str]:
    """Yield names, labels and ports that lead nowhere."""
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    labels = {
        template["metadata"]["labels"][NAME]: {
            port["name"] for c in containers(template) for port in c.get("ports", ())
        }
        for each in objects
        if each["kind"] == "Deployment"
        for _, template in pod_templates(each)
    }
    for each in objects:
        spec, said = each.get("spec", {}), f"{each['kind']}/{each['metadata']['name']}"
        selector = spec.get("selector", {})
        wanted = selector.get("matchLabels", selector).get(NAME)
        if each["kind"] in ("Service", "PodDisruptionBudget", "Deployment") and wanted not in labels:
            yield f"{said} selects {wanted!r}; there are {sorted(labels)}"
        if each["kind"] == "Service":
            for port in spec["ports"]:
                if port["targetPort"] not in labels.get(wanted, ()):
                    yield f"{said} sends to port {port['targetPort']!r}, which its pods do not have"
        target = spec.get("scaleTargetRef")
        if target is not None and (target["kind"], target["name"]) not in names:
            yield f"{said} scales {target['kind']}/{target['name']}, which is not here"
        for place, template in pod_templates(each):
            for container in containers(template):
                for source in container.get("envFrom", ()):
                    kind = "ConfigMap" if "configMapRef" in source else "Secret"
                    name = source.get("configMapRef", source.get("secretRef"))["name"]
                    if (kind, name) not in names:
                        yield f"{said} {place} reads {kind}/{name}, which is not here"


def settings_errors(objects: list[Object]) -> Iterator[str]:
    """Yield what the server says of the settings that each container would give it."""
    held = {
        each["metadata"]["name"]: {**each.get("data", {}), **each.get("stringData", {})}
        for each in objects
        if each["kind"] in ("ConfigMap", "Secret")
    }
    for each in objects:
        for place, template in pod_templates(each):
            for container in containers(template):
                environment: dict[str, str] = {}
                for source in container.get("envFrom", ()):
                    environment |= held.get(source.get("configMapRef", source.get("secretRef"))["name"], {})
                environment |= {entry["name"]: entry.get("value", "0.0.0.0") for entry in container.get("env", ())}
                for text in read_settings(environment):
                    yield f"{each['kind']}/{each['metadata']['name']} {place}/{container['name']}: {text}"


def read_settings(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the settings of an environment. Unknown names are wrong too."""
    for name in environment:
        if name.startswith("HUESHIFT_"):
            section, _, setting = name.removeprefix("HUESHIFT_").lower().partition("__")
            model: Any = Settings.model_fields[section].annotation if section in Settings.model_fields else None
            if model is None or setting not in model.model_fields:
                yield f"{name} is no setting"
    with patch.dict(os.environ, environment, clear=True):
        try:
            load_settings(None)
        except HueshiftError as error:
            yield error.message


def pool_errors(objects: list[Object]) -> Iterator[str]:
    """Yield node groups that no actor would be placed on, and pools without a group."""
    label = load_settings(None).cluster.pool_label
    for each in objects:
        if each["kind"] == "RayCluster":
            pools = [group.get("labels", {}).get(label) for group in each["spec"]["workerGroupSpecs"]]
            if sorted(map(str, pools)) != sorted(Pool):
                yield f"RayCluster/{each['metadata']['name']} has groups labelled {pools}, not {[*Pool]}"


def monitor_errors(objects: list[Object]) -> Iterator[str]:
    """Yield monitors that find nothing, or a port on which no server tells its metrics."""
    services = {
        each["metadata"].get("labels", {}).get(NAME): {port["name"]: port["port"] for port in each["spec"]["ports"]}
        for each in objects
        if each["kind"] == "Service"
    }
    # The labels that KubeRay gives to the pods of a group, whatever their template says.
    groups = {
        (each["metadata"]["name"], group["groupName"]): {
            port["name"]: port["containerPort"]
            for container in containers(group["template"])
            for port in container.get("ports", ())
        }
        for each in objects
        if each["kind"] == "RayCluster"
        for group in each["spec"]["workerGroupSpecs"]
        if "groupName" in group
    }
    served = load_settings(None).server.metrics_port
    for each in objects:
        said, spec = f"{each['kind']}/{each['metadata']['name']}", each.get("spec", {})
        if each["kind"] == "ServiceMonitor":
            (expression,) = spec["selector"]["matchExpressions"]
            found = {name: services.get(name) for name in expression["values"]}
            endpoints = spec.get("endpoints", ())
        elif each["kind"] == "PodMonitor":
            wanted = spec["selector"]["matchLabels"]
            group = (wanted.get("ray.io/cluster"), wanted.get("ray.io/group"))
            found, endpoints = {"/".join(map(str, group)): groups.get(group)}, spec.get("podMetricsEndpoints", ())
        else:
            continue
        for name, ports in found.items():
            if ports is None:
                yield f"{said} selects {name!r}, which is not here"
                continue
            for endpoint in endpoints:
                if ports.get(endpoint["port"]) != served:
                    yield f"{said} asks port {endpoint['port']!r} of {name!r}, which is not {served}"


def containers(template: Object) -> list[Object]:
    """Return the containers of a pod."""
    found: list[Object] = template["spec"]["containers"]
    return found


def _kubernetes_errors(each: Object) -> Iterator[str]:
    try:
        kubernetes_validate.validate(dict(each), VERSION, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        yield str(getattr(error, "message", error))


def main() -> int:
    """Say what is wrong; 0 if nothing is."""
    wrong = check()
    for text in wrong:
        sys.stdout.write(f"FAIL {text}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
