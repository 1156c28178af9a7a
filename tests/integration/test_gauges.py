"""Gauges that are set once, as a real Ray exports them."""

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from components.launch import ray_session
from serving.gauges import LastingGauge
from tests.stores import until


@ray.remote
class Told:
    """Sets gauges once."""

    def __init__(self) -> None:
        self.lasting = LastingGauge("lasting", description="Repeated.", tag_keys=("version",))
        self.plain = ray.util.metrics.Gauge("plain", description="Set once.")

    def tell(self) -> None:
        self.plain.set(1)
        for version in "12":
            self.lasting.set(1, {"version": version})

    def end(self) -> None:
        self.lasting.end({"version": "1"})


def exported() -> dict[str, float]:
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text
    ours = [family for family in text_string_to_metric_families(text) if family.name in ("ray_plain", "ray_lasting")]
    return {f"{one.name}{one.labels.get('version', '')}": one.value for family in ours for one in family.samples}


@pytest.mark.ray
def test_a_gauge_that_is_set_once_is_told_for_as_long_as_it_is_not_ended() -> None:
    with ray_session(num_cpus=1):
        told = Told.remote()
        ray.get(told.tell.remote())
        until(lambda: exported() == {"ray_plain": 1, "ray_lasting1": 1, "ray_lasting2": 1}, "all are exported")
        until(lambda: "ray_plain" not in exported(), "Ray forgets the plain one")  # why there are gauges of ours
        assert exported() == {"ray_lasting1": 1, "ray_lasting2": 1}
        ray.get(told.end.remote())
        until(lambda: exported().get("ray_lasting1") == 0, "its end is told")
        until(lambda: "ray_lasting1" not in exported(), "and it ends")
        assert exported() == {"ray_lasting2": 1}
