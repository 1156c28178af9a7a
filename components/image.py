"""The container image whose Python runs a stage's task; ``pipelines.placement`` chooses another per stage where wanted."""

IMAGE = "cllmr-platform-python:0.1.0"
