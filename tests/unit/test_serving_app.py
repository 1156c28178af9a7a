"""How a deployment's settings become Ray Serve's."""

import pytest
from ray import serve

from components.errors import ConfigError
from components.serve.config import ServeConfig
from serving.app import DOWNSCALE_SECONDS, UPSCALE_SECONDS, fewest_working, options, target_ongoing
from serving.room import FEWEST
from serving.run import parse_app_args
from serving.settings import Gateway, Replica


def deployed(replicas: Replica) -> serve.Deployment:
    return serve.deployment(name="Some", **options(replicas, drain_interval_s=2.0))(type("Some", (), {}))


def test_a_fixed_number_of_replicas_is_not_scaled() -> None:
    deployment = deployed(Replica(num_replicas=3, max_ongoing_requests=7))
    assert (deployment.num_replicas, deployment._deployment_config.autoscaling_config) == (3, None)
    assert deployment.max_ongoing_requests == 7


def test_replicas_are_added_fast_and_taken_away_slowly() -> None:
    scaling = deployed(Replica(num_replicas=2, max_replicas=6, max_ongoing_requests=32))._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 8)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (UPSCALE_SECONDS, DOWNSCALE_SECONDS)
    assert scaling.upscale_delay_s < scaling.downscale_delay_s / 100


def test_a_gateways_queue_stays_short_whatever_else_is_set() -> None:
    assert ServeConfig.parse({"gateway": {"num_replicas": 2}}, "serve").gateway.max_ongoing_requests == 64
    assert Gateway(num_replicas=2).max_ongoing_requests == 64


def test_where_gateways_are_added_one_that_refuses_still_shows_that_they_should_be() -> None:
    for most in (1, 4, 16, 64, 256):
        scaled = Gateway(max_replicas=3, max_ongoing_requests=most)
        assert target_ongoing(scaled) < fewest_working(scaled)
    assert fewest_working(Gateway(max_replicas=3)) == 12
    assert fewest_working(Gateway()) == FEWEST


def test_most_replicas_below_the_fewest_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_replicas = 1 is less than num_replicas = 2"):
        ServeConfig.parse({"scorer": {"num_replicas": 2, "max_replicas": 1}}, "serve")


def test_what_is_written_into_the_configuration_by_hand_has_the_same_limits() -> None:
    args = {"storage_root": "/store", "train": "0" * 16, "model_version": "1"}
    with pytest.raises(ConfigError, match=r"setting 'args.gateway.num_replicas' = -3: .*greater than or equal to 1"):
        parse_app_args({**args, "gateway": {"num_replicas": -3}})
    with pytest.raises(ConfigError, match="max_replicas = 1 is less than num_replicas = 2"):
        parse_app_args({**args, "scorer": {"num_replicas": 2, "max_replicas": 1}})
