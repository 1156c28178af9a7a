"""Gauges that are set once, as a real Ray exports them."""

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from components.local_ray import ray_session
from serving.gauges import LastingGauge
from tests.waiting import wait_until


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
        wait_until("all gauges", exported, lambda found: found == {"ray_plain": 1, "ray_lasting1": 1, "ray_lasting2": 1})
        # why there are gauges of ours
        wait_until("Ray to forget the plain one", exported, lambda found: "ray_plain" not in found)
        assert exported() == {"ray_lasting1": 1, "ray_lasting2": 1}
        ray.get(told.end.remote())
        wait_until("the end of a lasting one", exported, lambda found: found.get("ray_lasting1") == 0)
        wait_until("Ray to forget it", exported, lambda found: "ray_lasting1" not in found)
        assert exported() == {"ray_lasting2": 1}
