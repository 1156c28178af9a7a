"""What monitoring says: the queries of alerts and dashboards, the metrics they name, and what other programs export."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from tests.k8s.manifests import Object, of_kind

KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def rule_groups(objects: list[Object]) -> list[Object]:
    (rules,) = of_kind(objects, "PrometheusRule")
    groups: list[Object] = rules["spec"]["groups"]
    return groups


def alerts(objects: list[Object]) -> list[Object]:
    return [rule for group in rule_groups(objects) for rule in group["rules"] if "alert" in rule]


def recorded(objects: list[Object]) -> dict[str, str]:
    """Recording rules, by name."""
    return {rule["record"]: rule["expr"] for group in rule_groups(objects) for rule in group["rules"] if "record" in rule}


def dashboards(objects: list[Object]) -> dict[str, Object]:
    """Grafana's dashboards, by file name."""
    found = {}
    for item in of_kind(objects, "ConfigMap"):
        if item["metadata"].get("labels", {}).get("grafana_dashboard") == "1":
            found |= {name: json.loads(text) for name, text in item["data"].items()}
    return found


def panels(objects: list[Object]) -> Iterator[tuple[str, str]]:
    """Title and query of everything that is drawn."""
    for name, dashboard in dashboards(objects).items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]


def queries(objects: list[Object]) -> dict[str, str]:
    """Every query, by who asks it."""
    found = {rule.get("alert") or rule["record"]: rule["expr"] for group in rule_groups(objects) for rule in group["rules"]}
    for index, (who, query) in enumerate(panels(objects)):
        found[f"{who} [{index}]"] = query
    return found


def metrics(query: str) -> set[str]:
    """Names of the metrics in a PromQL expression."""
    text = re.sub(r'"(\\.|[^"\\])*"', '""', query)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    words = re.finditer(r"[a-zA-Z_:][\w:]*(?!\w*\s*\()", text)
    names = {match[0] for match in words if not re.match(r"\s*\(", text[match.end() :])}
    return {name for name in names if name not in KEYWORDS and not re.fullmatch(r"[a-z]\d*|\d.*", name)}


@cache
def exported_elsewhere() -> dict[str, list[str]]:
    """Labels by metric of the programs that do not run here."""
    return {
        name: labels
        for part in yaml.safe_load((Path(__file__).parent / "exporters.yaml").read_text()).values()
        for name, labels in part.items()
    }


@cache
def autoscaler_metrics() -> set[str]:
    """What Ray's autoscaler exports, from its own registry."""
    from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

    found = AutoscalerPrometheusMetrics(session_name="s")
    return {sample for metric in found.registry.collect() for sample in (metric.name, f"{metric.name}_total")}
