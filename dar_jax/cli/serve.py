"""The command that serves a checkpoint to browsers and programs."""

import contextlib
import ipaddress
import signal
import socket
import webbrowser
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dar_jax.cli.options import Flag, Optional, Place, Words
from dar_jax.config import Range
from dar_jax.console import show
from dar_jax.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MOST_TOKEN = 4096  # bytes


@dataclass(frozen=True)
class Serve:
    """Serve a page on which images sharpen group by group, and an API in the form of OpenAI's.

    Only this machine can reach it, unless --host says otherwise, which needs a --token. Requests share
    batches, which they join and leave between groups of tokens; each image is the one that `dar-jax sample` draws.
    Needs: pip install ".[serve]"

    Example: dar-jax serve runs/digits
    """

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP
    port: Annotated[int, Range(0, 65535)] = 8080  # 0: any that is free
    host: str = "127.0.0.1"  # the address to listen at; 0.0.0.0: all of this machine
    token: Optional[str] = None  # a file that holds a token, which requests must carry (Authorization: Bearer ...)
    allowed_hosts: Optional[Words[str]] = None  # further names that it answers to, such as that of a proxy
    open: Flag = False  # open the page in a browser
    max_batch: Annotated[int, Range(1, 256)] = 16  # images drawn at a time
    max_waiting: Annotated[int, Range(16, 10**5)] = 64  # images that may wait for their turn; others are refused
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or parts of sampling
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step

    def run(self) -> None:
        try:
            import uvicorn

            from dar_jax.serve.app import make_app
        except ImportError as error:
            raise InputError(f'{error.name} is not installed; dar-jax serve needs: pip install ".[serve]"') from error
        from dar_jax.experiment import load_experiment
        from dar_jax.inference.trained import inspect_transformer, load_sampler
        from dar_jax.serve.engine import Engine

        token, hosts = self._token(), {*LOOPBACK, *(name.lower() for name in self.allowed_hosts or ())}
        if not _is_loopback(self.host):
            if token is None:
                raise InputError(f"others than this machine can reach {self.host}; that needs a --token FILE")
            hosts |= {"*", self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        inspect_transformer(self.checkpoint)
        experiment = None if self.experiment is None else load_experiment(self.experiment)
        listener = _listen(self.host, self.port)
        with listener:
            engine = Engine(load_sampler(self.checkpoint, experiment, self.weights), self.max_batch, self.max_waiting)

            class Server(uvicorn.Server):
                def handle_exit(self, sig: int, frame: Any) -> None:
                    engine.stop()  # so that streams under way end
                    super().handle_exit(sig, frame)

            options = {"log_config": None, "log_level": "error", "access_log": False, "lifespan": "off", "server_header": False}
            options |= {"limit_concurrency": 512, "timeout_graceful_shutdown": 3}
            options |= {"http": "h11", "h11_max_incomplete_event_size": 1 << 16}  # httptools takes headers of any size
            server = Server(uvicorn.Config(make_app(engine, hosts, token), **options))
            name = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{name}:{listener.getsockname()[1]}/"
            show(f"{address}   (Ctrl-C ends it)" + ("" if token is None else "\nappend #token=TOKEN, the content of the file"))
            if self.open:
                webbrowser.open(address)
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises the signal again at its end
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    server.run(sockets=[listener])
            finally:
                signal.signal(signal.SIGTERM, before)
                engine.close()

    def _token(self) -> str | None:
        if self.token is None:
            return None
        try:
            with open(self.token, "rb") as file:
                text = file.read(MOST_TOKEN + 1).decode("ascii").strip()
        except OSError as error:
            raise InputError(f"cannot read the token {self.token}: {error.strerror}") from error
        except UnicodeDecodeError:
            text = ""
        if not 16 <= len(text) <= MOST_TOKEN or not text.isprintable() or " " in text:
            raise InputError(f"{self.token} should hold a token of 16 characters or more, ASCII without spaces")
        return text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # the latter for what is no name of a host
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host} port {port}: {reason}; try another --host or --port") from error
