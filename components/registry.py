"""The model registry, on MLflow: which bundle is served, which was before, and which may be next.

It decides what is served, so its operations fail with a `RegistryError` when it is down.

A model version is one bundle, known by the fingerprint of the train stage. The aliases ``champion`` (served), ``challenger``
(registered last) and ``previous`` (what a rollback returns to) move; versions do not change. Who was champion, in order, is
kept in a tag of the registered model, so that repeated rollbacks go further and further back.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.errors import ConfigError, UserError
from components.mlflow_client import (
    connect,
    is_broken_off,
    reason,
    safe_name,
    sqlite_file,
    tracker_errors,
    without_password,
)

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"

_HISTORY_TAG = "champions"
_WITHDRAWN_TAG = "withdrawn_at"
_PROMOTED_OVER_TAG = "promoted_over"
_METRIC_TAG = "metric."
_MAX_HISTORY = 50


class RegistryError(UserError):
    """The model registry cannot be reached, or does not hold what is asked for."""

    code = "registry_error"


class StateChanged(Exception):
    """The registry is no longer what a promotion was decided by: it has another champion, or a rollback was made."""


@dataclass(frozen=True)
class ModelVersion:
    """One registered bundle."""

    version: str
    """Number in the registry, as text."""
    fingerprint: str
    """Of the train stage that wrote the bundle."""
    storage_root: str
    """Where its artifacts live."""
    bundle: str
    """The bundle's directory when it was registered, relative to the storage root: ``train/<fingerprint>/bundle``, and in a
    remote store with the upload's folder in between."""
    metrics: dict[str, float]
    """Main figures of its evaluation."""
    created_at: str
    """When it was registered, UTC, ISO 8601."""
    aliases: tuple[str, ...] = ()
    """Of ``champion``, ``challenger``, ``previous`` those that point here."""
    promoted_over: str | None = None
    """Fingerprint of the champion it replaced, "" if it was the first; None if it was never promoted."""
    withdrawn_at: str = ""
    """When a rollback took it out of service, UTC; empty if none did. The gate does not promote it again by itself."""
    tags: dict[str, str] = field(default_factory=dict)
    """Whatever else was noted: fingerprints of its parents."""

    @property
    def bundle_uri(self) -> str:
        """The bundle's directory as a path or URI."""
        return f"{self.storage_root.rstrip('/')}/{self.bundle}"


def default_tracking_uri(storage_root: str, tracking_uri: str = "") -> str:
    """`tracking_uri`, or SQLite below a local storage root when it is empty.

    Raises:
        ConfigError: it is empty and the storage root is remote, where no SQLite file can live, or has a ? or % in its path,
            which would name another file.
    """
    if tracking_uri:
        return tracking_uri
    local = storage_root.removeprefix("file://")
    if "://" in local:
        raise ConfigError(
            f"setting 'promote.tracking_uri' is empty, and the storage root '{storage_root}' is not a local path.",
            "Name an MLflow server: --set promote.tracking_uri=http://mlflow.example:5000",
        )
    path = Path(local).absolute() / "mlflow.db"
    if set("?%") & set(str(path)):  # they would name another file; MLflow does not read them escaped
        raise ConfigError(
            f"storage root '{storage_root}': the address of the SQLite file '{path}' may not hold ? or %.",
            "Choose another with --storage, or name an MLflow server: --set promote.tracking_uri=http://mlflow.example:5000",
        )
    return f"sqlite:///{path}"


def registered_root(storage_root: str) -> str:
    """A storage root as the registry notes it: it is read later from other working directories."""
    return storage_root.rstrip("/") if "://" in storage_root else str(Path(storage_root).absolute())


class Registry:
    """Model versions of one name and the aliases that say which one is served.

    Args:
        tracking_uri: of MLflow; see `default_tracking_uri`.
        model_name: name of the registered model.

    Every method raises RegistryError when the registry cannot be reached.
    """

    def __init__(self, tracking_uri: str, model_name: str) -> None:
        self.tracking_uri = tracking_uri
        self.model_name = model_name
        self._client: Any = None  # of the first call: connecting imports MLflow and checks the database's schema

    def champion(self) -> ModelVersion | None:
        """The version that is served, or None before the first promotion."""
        with self._call() as client:
            return self._by_alias(client, CHAMPION)

    def previous(self) -> ModelVersion | None:
        """The version that a rollback returns to, or None."""
        with self._call() as client:
            return self._by_alias(client, PREVIOUS)

    def challenger(self) -> ModelVersion | None:
        """The version that was registered last, unless it is the champion or a rollback took it out of service; or None."""
        with self._call() as client:
            found = self._by_alias(client, CHALLENGER)
        return None if found is None or found.withdrawn_at or CHAMPION in found.aliases else found

    def versions(self) -> list[ModelVersion]:
        """All versions, newest first."""
        with self._call() as client:
            return self._versions(client)

    def find(self, fingerprint: str) -> ModelVersion | None:
        """The version of one bundle, or None."""
        return next((version for version in self.versions() if version.fingerprint == fingerprint), None)

    def register(
        self,
        fingerprint: str,
        storage_root: str,
        bundle: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> ModelVersion:
        """Registers a bundle as the challenger; one registered before is found by its fingerprint and brought up to date.

        Args:
            fingerprint: of the train stage.
            storage_root: where its artifacts live.
            bundle: its directory relative to the storage root.
            metrics: main figures, by name.
            tags: more to note; names may hold letters, digits, underscores, dots and dashes.
            run_id: the tracking run it came from, when there is one.
        """
        storage_root = registered_root(storage_root)
        noted = {"fingerprint": fingerprint, "storage_root": storage_root, "bundle": bundle, **(tags or {})}
        noted |= {_METRIC_TAG + safe_name(name): repr(float(value)) for name, value in metrics.items()}
        with self._call(makes=True) as client:
            self._ensure_model(client)
            known = next((version for version in self._versions(client) if version.fingerprint == fingerprint), None)
            if known is None:
                source = storage_root if "://" in storage_root else Path(storage_root).as_uri()
                created = client.create_model_version(self.model_name, f"{source.rstrip('/')}/{bundle}", run_id, tags=noted)
                version = str(created.version)
            else:
                version = known.version
                for key, value in noted.items():
                    client.set_model_version_tag(self.model_name, version, key, value)
            client.set_registered_model_alias(self.model_name, CHALLENGER, version)
            return self._get(client, version)

    def relocate(self, fingerprint: str, storage_root: str, bundle: str) -> ModelVersion:
        """Notes that a registered bundle lies elsewhere now, see `register`; no alias moves.

        Raises:
            RegistryError: no version has this fingerprint.
        """
        with self._call() as client:
            versions = self._versions(client)
            known = next((version for version in versions if version.fingerprint == fingerprint), None)
            if known is None:
                raise _no_such_version(self.model_name, fingerprint, versions)
            for key, value in {"storage_root": registered_root(storage_root), "bundle": bundle}.items():
                client.set_model_version_tag(self.model_name, known.version, key, value)
            return self._get(client, known.version)

    def promote(self, fingerprint: str, over: str | None = None) -> ModelVersion:
        """Makes a registered bundle the champion; the champion until now becomes ``previous``.

        Promoting the champion again changes nothing but a mark that it was withdrawn.

        Args:
            fingerprint: of the bundle.
            over: fingerprint of the champion that it was judged against, "" if there was none; None: a person decides, whoever
                is champion.

        Raises:
            RegistryError: no version has this fingerprint.
            StateChanged: `over` is not champion, or the bundle has been withdrawn since it was judged; nothing is changed.
        """
        with self._call() as client:
            versions = self._versions(client)
            target = next((version for version in versions if version.fingerprint == fingerprint), None)
            if target is None:
                raise _no_such_version(self.model_name, fingerprint, versions)
            champions = self._history(client)  # read now: judging takes minutes, and another run may have promoted meanwhile
            replaced = self._get(client, champions[-1]).fingerprint if champions else ""
            if over is not None and (replaced != over or target.withdrawn_at):
                raise StateChanged
            if target.withdrawn_at:
                client.delete_model_version_tag(self.model_name, target.version, _WITHDRAWN_TAG)
            if champions[-1:] != [target.version]:
                champions.append(target.version)
                client.set_model_version_tag(self.model_name, target.version, _PROMOTED_OVER_TAG, replaced)
                self._write_history(client, champions)  # before the alias moves: a list that is ahead of it is cut, not lost
            self._point(client, champions)
            return self._get(client, target.version)

    def rollback(self) -> ModelVersion:
        """Makes the champion before this one the champion again and marks this one as withdrawn; returns the new champion.

        Raises:
            RegistryError: there was no champion before this one.
        """
        with self._call() as client:
            champions = self._history(client)
            if len(champions) < 2:
                raise _nothing_before(self.model_name, "has had only one champion" if champions else "has no champion")
            withdrawn = champions.pop()
            client.set_model_version_tag(self.model_name, withdrawn, _WITHDRAWN_TAG, _now())
            self._point(client, champions)
            self._write_history(client, champions)
            return self._get(client, champions[-1])

    def forget(self, fingerprints: Collection[str], storage_root: str) -> list[ModelVersion]:
        """Deletes the versions of bundles that are to be removed, but for those of `pointed_at`; the deleted ones.

        A rollback then passes them over.

        Args:
            fingerprints: of the bundles.
            storage_root: where they lie: one of the same fingerprint below another root stays, with its version.
        """
        with self._call() as client:
            pointed_at = {one.version for one in self._pointed_at(client)}
            here = [one for one in self._versions(client) if one.storage_root == registered_root(storage_root)]
            gone = [one for one in here if one.fingerprint in fingerprints and one.version not in pointed_at]
            names = {one.version for one in gone}
            if gone:
                self._write_history(client, [version for version in self._history(client) if version not in names])
            for one in gone:
                client.delete_model_version(self.model_name, one.version)
            return gone

    @contextmanager
    def _call(self, makes: bool = False) -> Iterator[Any]:
        """A client, its failures as RegistryError; None where there is nothing to read or to move yet and nothing is made:
        connecting would create a database.
        """
        path = sqlite_file(self.tracking_uri)
        if path is not None and not makes and not path.exists():
            yield None
            return
        try:
            self._client = self._client or connect(self.tracking_uri)
        except ImportError as error:
            raise RegistryError(
                f"the model registry '{without_password(self.tracking_uri)}' needs a package that is not installed: {error}.",
                "pip install 'cllmr-platform[tracking]', and the driver of the database if it is not SQLite.",
            ) from None
        except tracker_errors() as error:
            raise _unreachable(self.tracking_uri, error) from error
        try:
            yield self._client
        except tracker_errors() as error:
            raise _unreachable(self.tracking_uri, error) from error

    def pointed_at(self) -> list[ModelVersion]:
        """The versions that an alias points at, or will when a promotion or rollback that broke off is done again."""
        with self._call() as client:
            return self._pointed_at(client)

    # -- one call each --------------------------------------------------------------------------------------------------

    def _point(self, client: Any, champions: list[str]) -> None:
        """Moves the aliases to the end of the list of champions.

        The champion last: until then all that broke off is done again by the next try, as the one before is still champion.
        """
        if len(champions) > 1:
            client.set_registered_model_alias(self.model_name, PREVIOUS, champions[-2])
        elif PREVIOUS in client.get_registered_model(self.model_name).aliases:
            client.delete_registered_model_alias(self.model_name, PREVIOUS)
        client.set_registered_model_alias(self.model_name, CHAMPION, champions[-1])

    def _pointed_at(self, client: Any) -> list[ModelVersion]:
        last = self._history(client)[-2:]  # what a move of the aliases that has broken off has moved away from, too
        return [version for version in self._versions(client) if version.aliases or version.version in last]

    def _history(self, client: Any) -> list[str]:
        """Versions that were champion, oldest first, ending with the one that is.

        The alias is the truth: what a broken-off promotion or rollback left behind it in the list is cut off.
        """
        model = self._model(client)
        if model is None or CHAMPION not in model.aliases:
            return []
        champions = [str(version) for version in json.loads(model.tags.get(_HISTORY_TAG, "[]"))]
        current = str(model.aliases[CHAMPION])
        while champions and champions[-1] != current:
            champions.pop()
        return champions or [current]

    def _write_history(self, client: Any, champions: list[str]) -> None:
        client.set_registered_model_tag(self.model_name, _HISTORY_TAG, json.dumps(champions[-_MAX_HISTORY:]))

    def _model(self, client: Any) -> Any | None:
        if client is None:
            return None
        from mlflow.exceptions import MlflowException

        try:
            return client.get_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _ensure_model(self, client: Any) -> None:
        from mlflow.exceptions import MlflowException

        if self._model(client) is None:
            try:
                client.create_registered_model(self.model_name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run created it in between
                    raise

    def _by_alias(self, client: Any, alias: str) -> ModelVersion | None:
        model = self._model(client)
        if model is None or alias not in model.aliases:
            return None
        return self._get(client, str(model.aliases[alias]))

    def _get(self, client: Any, version: str) -> ModelVersion:
        model = client.get_registered_model(self.model_name)
        return _model_version(client.get_model_version(self.model_name, version), model.aliases)

    def _versions(self, client: Any) -> list[ModelVersion]:
        model = self._model(client)
        if model is None:
            return []
        found, token = [], None
        while True:
            page = client.search_model_versions(f"name='{_quoted(self.model_name)}'", page_token=token)
            found += [_model_version(entry, model.aliases) for entry in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version), reverse=True)


def registered_models(tracking_uri: str) -> list[str]:
    """Names of all models in a registry; raises RegistryError when it cannot be reached."""
    names, token = [], None
    with Registry(tracking_uri, "")._call() as client:
        while client is not None:
            page = client.search_registered_models(page_token=token)
            names += [str(model.name) for model in page]
            token = page.token
            if not token:
                break
    return names


def pointed_at(tracking_uri: str) -> set[str]:
    """Fingerprints of `Registry.pointed_at` of all models, whatever their names; raises RegistryError when it is away.

    Versions of other teams, which have none, are passed over.
    """
    return {
        version.fingerprint
        for name in registered_models(tracking_uri)
        for version in Registry(tracking_uri, name).pointed_at()
        if version.fingerprint
    }


def _model_version(entry: Any, aliases: Mapping[str, Any]) -> ModelVersion:
    tags = dict(entry.tags)
    version = str(entry.version)
    metrics = {}
    for key in [key for key in tags if key.startswith(_METRIC_TAG)]:
        with suppress(ValueError):  # another team's, which means something else by it: it stays a tag
            metrics[_unsafe(key.removeprefix(_METRIC_TAG))] = float(tags[key])
            del tags[key]
    return ModelVersion(
        version=version,
        fingerprint=tags.pop("fingerprint", ""),
        storage_root=tags.pop("storage_root", ""),
        bundle=tags.pop("bundle", ""),
        metrics=metrics,
        created_at=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        aliases=tuple(sorted(alias for alias, target in aliases.items() if str(target) == version)),
        promoted_over=tags.pop(_PROMOTED_OVER_TAG, None),
        withdrawn_at=tags.pop(_WITHDRAWN_TAG, ""),
        tags=tags,
    )


def _no_such_version(model_name: str, fingerprint: str, versions: Sequence[ModelVersion]) -> RegistryError:
    known = ", ".join(version.fingerprint for version in versions[:10])
    return RegistryError(
        f"model '{model_name}' has no version with fingerprint '{fingerprint}'.",
        f"Registered, newest first: {known}." if known else "None is registered: cllmr run makes one.",
    )


def _nothing_before(model_name: str, what: str) -> RegistryError:
    return RegistryError(
        f"model '{model_name}' {what}: there is nothing to roll back to.",
        "Promote another version by its fingerprint: cllmr promote FINGERPRINT",
    )


def _unreachable(tracking_uri: str, error: Exception) -> RegistryError:
    if (path := sqlite_file(tracking_uri)) is not None and is_broken_off(error):
        return RegistryError(
            f"model registry '{path}' is not whole: it was interrupted while its tables were made ({reason(error)}).",
            "Put back a copy of the file; if no model was ever registered in it, move it away: cllmr run makes another.",
        )
    return RegistryError(
        f"model registry '{without_password(tracking_uri)}' does not answer: {reason(error)}.",
        "Check promote.tracking_uri, and that the server or its database is up.",
    )


def _unsafe(name: str) -> str:
    """The inverse of `safe_name`, for a metric."""
    return name.replace("_at_", "@")


def _quoted(name: str) -> str:
    return name.replace("'", "\\'")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
