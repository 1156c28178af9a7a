"""Settings of Kubeflow Pipelines."""

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat


class ClusterConfig(BaseModel):
    """Where Kubeflow Pipelines is and how runs are filed there; secrets come from files and the environment alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str | None = None
    """URL of the KFP API, with https:// or http://; none: the environment variable KF_PIPELINES_ENDPOINT."""
    ui_host: str | None = None
    """URL of the KFP web interface, for links; none: the host."""
    namespace: str | None = Field(default=None, max_length=63, pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """Profile namespace, which a multi-user KFP demands; none: a single-user KFP."""
    experiment: str = Field(default="cllmr", min_length=1)
    """Experiment that the runs are filed under; made when it is not there."""
    service_account: str | None = None
    """Kubernetes service account of the tasks; none: KFP's default."""
    pipeline_root: str | None = None
    """Where KFP keeps the manifests that tasks hand on; none: KFP's default."""
    token_file: str | None = None
    """File of a projected service-account token, read anew for every request, as Kubernetes renews it; none: the file that
    KF_PIPELINES_SA_TOKEN_PATH names, a token in CLLMR_KFP_TOKEN, or CLLMR_KFP_COOKIES (``name=value; ...`` of a browser that
    has signed in)."""
    ca_file: str | None = None
    """PEM file of the authority that signed the host's certificate; none: the usual ones."""
    request_timeout_s: PositiveFloat = 30.0
    """Seconds to wait for one answer."""
    patience_s: PositiveFloat = 60.0
    """Seconds of trying again when the host is throttling, failing or away."""
    poll_s: PositiveFloat = 10.0
    """Seconds between two looks at a run that is waited for."""
