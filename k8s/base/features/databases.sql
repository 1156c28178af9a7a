-- Run once, when the data directory is empty.
CREATE DATABASE mlflow;
CREATE DATABASE feast;
