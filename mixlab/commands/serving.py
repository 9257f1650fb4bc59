"""The commands that serve over HTTP, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from mixlab.commands.context import Context, emit, find_weights, parse_size, plain_name, say_cautions
from mixlab.errors import UsageError
from mixlab.language import Language
from mixlab.words import install_hint


def serve(
    run: str,
    /,
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    token: str | None = None,
    name: tuple[str, ...] = (),
    root_path: str = "",
    lang: Language | None = None,
    open: bool = False,
    image_size: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Serve a model over HTTP, with a page for people at / and a description for programs at /docs.

    Parameters
    ----------
    run
        A run by name or path, a weights file of any known format, or a published name.
    port
        0 takes a free one.
    host
        The address to listen at; by default only this machine can reach it.
    token
        What callers must send as `Authorization: Bearer TOKEN`; needed for any other host. MIXLAB_TOKEN says it too,
        without showing it to everyone who lists processes.
    name
        A name that this server is reached by from elsewhere; may be given several times. '*' is any, with a token.
    root_path
        A prefix under which a proxy shows this server, such as /mixlab.
    lang
        The language of the page; by default the browser's.
    open
        Open the page in a browser once the server answers.
    image_size
        Side, or HxW, in pixels: resample the Mixer to it first.
    """
    from mixlab.device import set_threads
    from mixlab.serving.predict import load

    token = token or os.environ.get("MIXLAB_TOKEN") or None
    try:
        from mixlab.serving.listen import (
            allowed_hosts,
            check_address,
            check_root_path,
            default_limits,
            listen,
            make_server,
        )
        from mixlab.serving.server import create_app
        from mixlab.serving.service import Service
    except ModuleNotFoundError as error:
        raise UsageError(f"this needs {error.name}", hint=install_hint("serve")) from error
    check_address(host, port, token)
    hosts, root_path = allowed_hosts(host, name, token), check_root_path(root_path)
    set_threads(threads)
    screen = Context.screen()
    with screen.progress_if_any("downloading") as progress:
        classifier = load(find_weights(run), parse_size(image_size), device=device, progress=progress)
    say_cautions(classifier.cautions)
    service = Service(classifier, plain_name(run), default_limits())
    app = create_app(service, hosts=hosts, token=token, root_path=root_path, language=lang)
    say = _announcer(host, service.name, open_it=open)
    listen(make_server(app, host=host, port=port, started=say, stopping=service.drain))


def _announcer(host: str, what: str, *, open_it: bool = False) -> Callable[[int], None]:
    def say(port: int) -> None:
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        Context.screen().say(f"{what} at {where}  (Ctrl-C stops it)")
        emit({"address": where, "serves": what})
        if open_it:  # in a thread: a browser of the terminal ends only when it is left
            local = where.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
            Thread(target=_open, args=(local,), daemon=True).start()

    return say


def _open(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        Context.screen().say(f"no browser could be opened: open {address} yourself")


def ui(
    runs: Path | None = None,
    /,
    *,
    studies: Path | None = None,
    port: int = 8001,
    host: str = "127.0.0.1",
    token: str | None = None,
    name: tuple[str, ...] = (),
    root_path: str = "",
    lang: Language | None = None,
    open: bool = False,
) -> None:
    """Look at runs and studies in a browser: curves while they train, differences, reports.

    Parameters
    ----------
    runs
        The folder with the runs; by default ./runs.
    studies
        The folder with the studies; by default ./studies.
    port
        0 takes a free one.
    host
        As for `serve`, and so are token, name, root_path, lang and open.
    """
    from mixlab.studies import open_study, study_names
    from mixlab.training.run_folder import list_runs

    token = token or os.environ.get("MIXLAB_TOKEN") or None
    try:
        from mixlab.serving.listen import allowed_hosts, check_address, check_root_path, listen, make_server
        from mixlab.serving.ui import create_ui
    except ModuleNotFoundError as error:
        raise UsageError(f"this needs {error.name}", hint=install_hint("serve")) from error
    check_address(host, port, token)
    hosts, root_path = allowed_hosts(host, name, token), check_root_path(root_path)
    for named in (runs, studies):
        if named is not None and not named.is_dir():
            raise UsageError("there is no such folder", where=str(named))
    runs, studies = runs or Path("runs"), studies or Path("studies")
    if not runs.is_dir() and not studies.is_dir():
        raise UsageError(
            "there is neither ./runs nor ./studies", hint="name a folder: mixlab ui RUNS; or train first"
        )
    known = {known.name: known.subject for known in map(open_study, study_names())}
    app = create_ui(
        runs, studies, list_runs, known, hosts=hosts, token=token, root_path=root_path, language=lang
    )
    started = _announcer(host, "the runs", open_it=open)
    listen(make_server(app, host=host, port=port, started=started))
