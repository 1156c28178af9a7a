"""Gauges that are set once, and means, as a real Ray exports them."""

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from components.local_ray import ray_session
from serving.gauges import LastingGauge
from serving.metrics import Mean
from tests.waiting import wait_until


@ray.remote
class Told:
    """Sets gauges once, and observes numbers."""

    def __init__(self) -> None:
        self.lasting = LastingGauge("lasting", description="Repeated.", tag_keys=("version",))
        self.plain = ray.util.metrics.Gauge("plain", description="Set once.")

        self.mean = Mean("mean", description="Numbers.", tag_keys=("version",))

    def tell(self) -> None:
        for value in (1, 1, 0.5, 0):
            self.mean.observe(value, {"version": "1"})
        self.plain.set(1)
        for version in "12":
            self.lasting.set(1, {"version": version})

    def end(self) -> None:
        self.lasting.end({"version": "1"})


def exported(*names: str) -> dict[str, float]:
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text
    found = [one for family in text_string_to_metric_families(text) for one in family.samples if one.name in names]
    return {f"{one.name}{one.labels.get('version', '')}": one.value for one in found}


def gauges() -> dict[str, float]:
    return exported("ray_plain", "ray_lasting")


def means() -> dict[str, float]:
    return exported("ray_mean_sum_total", "ray_mean_count_total")


@pytest.mark.ray
def test_a_gauge_that_is_set_once_is_told_for_as_long_as_it_is_not_ended_and_a_mean_is_that_of_the_numbers() -> None:
    with ray_session(num_cpus=1):
        told = Told.remote()
        ray.get(told.tell.remote())
        wait_until("all gauges", gauges, lambda found: found == {"ray_plain": 1, "ray_lasting1": 1, "ray_lasting2": 1})
        wait_until("the mean", means, lambda found: found == {"ray_mean_sum_total1": 2.5, "ray_mean_count_total1": 4})
        # why there are gauges of ours
        wait_until("Ray to forget the plain one", gauges, lambda found: "ray_plain" not in found)
        assert gauges() == {"ray_lasting1": 1, "ray_lasting2": 1}
        ray.get(told.end.remote())
        wait_until("the end of a lasting one", gauges, lambda found: found.get("ray_lasting1") == 0)
        wait_until("Ray to forget it", gauges, lambda found: "ray_lasting1" not in found)
        assert gauges() == {"ray_lasting2": 1}
