"""Bundles: a folder of artifacts and a manifest that vouches for each by size and digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lenet_deploy.checkpoint import metadata_from_json
from lenet_deploy.errors import BadInput, DamagedFile, first_line
from lenet_deploy.records import Artifact, ArtifactMetadata, Environment, Manifest
from lenet_deploy.store import cannot_write, digest, manifest_json, parse, read_file, sha256, write_file

MANIFEST = "manifest.json"
STATUSES = ("verified", "unverified")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest."""

    path: Path
    manifest: Manifest

    @property
    def metadata(self) -> ArtifactMetadata:
        """Model, preprocessing, labels and digest of the weights."""
        return self.manifest.metadata

    def artifact(self, name: str) -> Artifact | None:
        """The artifact of that name, or None."""
        return next((artifact for artifact in self.manifest.artifacts if artifact.name == name), None)

    def read(self, artifact: Artifact) -> bytes:
        """The artifact's bytes, size and digest verified before anything else sees them.

        Raises:
            BadInput: the file is absent or cannot be read.
            DamagedFile: its size or digest is not the manifest's.
        """
        path = self.path / artifact.path
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
            size = path.stat().st_size
        except (OSError, ValueError):
            inside, size = True, artifact.size_bytes  # read_file has the words for it
        if not inside:
            raise DamagedFile(f"{path}: a link that leaves the bundle; copy the file into it")
        data = read_file(path, "an artifact") if size == artifact.size_bytes else b""
        if size != artifact.size_bytes or sha256(data) != artifact.sha256:
            raise DamagedFile(f"{path}: its sha256 is not the one in {MANIFEST}; the file was altered, export the bundle again")
        return data


def open_bundle(path: Path) -> Bundle:
    """Open a bundle folder; artifacts are verified when they are read.

    Raises:
        BadInput: absent, or no folder with a manifest.
        DamagedFile: a manifest that is truncated, altered, of another version, or that points outside the bundle.
    """
    try:
        bare = path.is_dir() and not (path / MANIFEST).exists()
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(path)[:80]}: cannot be read ({first_line(error)}); check the path and its permissions") from None
    if bare:
        raise BadInput(f"{path}: not a bundle, it has no {MANIFEST}; make one with lenet-deploy export")
    where = path / MANIFEST
    document = parse(read_file(where, "a bundle's manifest"), "manifest", 1, where)
    if document.pop("digest", None) != digest(document):
        raise DamagedFile(f"{where}: its digest does not match its content; the file was altered, export the bundle again")
    try:
        manifest = _manifest(document, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{where}: incomplete or altered ({error!r}); export the bundle again") from None
    return Bundle(path, manifest)


def write_artifact(folder: Path, name: str, format: str, path: str, data: bytes, details: Mapping[str, Any] | None = None) -> Artifact:
    """Write one file of a bundle under construction and return its entry, not yet verified."""
    write_file(folder / path, data)
    return Artifact(name, format, path, sha256(data), len(data), "unverified", details or {})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or rewrite a bundle's manifest; raises CannotWrite."""
    write_file(folder / MANIFEST, manifest_json(manifest).encode())


def check_target(target: Path, force: bool) -> bool:
    """Refuse early what a publication could not or must not replace; returns whether there is a folder to replace.

    Raises:
        BadInput: something stands there that is no bundle, or a bundle and `force` is false.
    """
    try:
        if target.is_symlink():
            raise BadInput(f"{target}: a symbolic link; name the folder it points to")
        if not target.exists():
            return False
    except OSError as error:  # a name that is too long, say
        raise cannot_write(target, error) from error
    if not target.is_dir():
        raise BadInput(f"{target}: a file, where the bundle's folder is to be; choose another --out")
    if not any(target.iterdir()):
        return True
    try:
        open_bundle(target)
    except BadInput as error:
        raise BadInput(f"{target}: exists and is not a bundle, so it is left alone ({error}); choose another --out") from None
    if not force:
        raise BadInput(f"{target}: exists already; add --force to replace it, or choose another --out")
    return True


def _manifest(document: dict[str, Any], where: Path) -> Manifest:
    metadata = metadata_from_json({**document, "preprocessing": document["input"]}, str(where))
    artifacts = tuple(_artifact(entry, where) for entry in document["artifacts"])
    names = [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names):
        raise DamagedFile(f"{where}: two artifacts share a name")
    environment = Environment(**document["environment"])
    return Manifest(metadata, artifacts, dict(document["versions"]), document["dataset"], environment)


def _artifact(entry: dict[str, Any], where: Path) -> Artifact:
    artifact = Artifact(**entry)
    texts = (artifact.name, artifact.format, artifact.path, artifact.sha256, artifact.status)
    mappings = isinstance(artifact.details, dict) and isinstance(artifact.accuracy, dict)
    if not (mappings and all(isinstance(text, str) for text in texts) and type(artifact.size_bytes) is int):
        raise DamagedFile(f"{where}: an artifact's entry has the wrong types")
    path = PurePosixPath(artifact.path)
    if path.is_absolute() or ".." in path.parts or "\\" in artifact.path or "\0" in artifact.path or not path.parts:
        raise DamagedFile(f"{where}: artifact path {artifact.path!r} leaves the bundle; do not use this bundle")
    if artifact.status not in STATUSES or len(artifact.sha256) != 64 or artifact.size_bytes < 0:
        raise DamagedFile(f"{where}: artifact {artifact.name} has an impossible status, digest or size")
    return artifact
