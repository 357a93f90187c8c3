# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2026.4", "packaging"]
# ///
"""The menu: everything that a contributor or CI does is one session here.

`python3 dev.py SESSION` brings nox itself; with nox installed it is `nox -s SESSION`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.version import Version

nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
# One set of environments a Python: nox reuses one whatever Python made it, so that calling it
# with 3.13 would else test 3.11 again.
nox.options.envdir = f".nox/py{sys.version_info.major}.{sys.version_info.minor}"
nox.options.sessions = ["check"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
UV = (sys.executable, "-m", "uv")  # the uv that nox[uv] brought, never one from PATH
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text())["project"]
    for path in sorted((ROOT / "packages").glob("*/pyproject.toml"))
}
BUILT: dict[str, Path] = {}  # the wheels that this nox run has built
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2"}
TESTED = {**QUIET, "DS_PRECISION_KERNELS": "on"}  # compiled operations, where they are slower too
TESTED_EXTRAS = ("plot", "tensorboard", "mlflow", "wandb", "notebook", "otel")  # all but `gpu`
COVERAGE = 90  # per cent of each package's lines and branches, by its own tests alone


def keep_cache_near() -> None:
    """Let uv's cache lie where its files can be linked from: copies take 2 GB an environment."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path(home) / "uv")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (ROOT / ".nox").mkdir(exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(dir=cache) as file,
            tempfile.TemporaryDirectory(dir=ROOT / ".nox") as folder,
        ):
            os.link(file.name, Path(folder) / "link")
    except OSError:  # another file system, or a home that can't be written
        os.environ["UV_CACHE_DIR"] = str(ROOT / ".nox" / "uv-cache")


keep_cache_near()
# Where it is set, every process compiles TensorFlow's Python anew: ten seconds each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def siblings_of(package: str) -> dict[str, Requirement]:
    """Return the ranges on its siblings that a package declares, by name, theirs included."""
    found: dict[str, Requirement] = {}
    for line in PROJECTS[package]["dependencies"]:
        requirement = Requirement(line)
        if requirement.name in PROJECTS:
            found |= siblings_of(requirement.name) | {requirement.name: requirement}
    return found


LOWEST_FIRST = sorted(PROJECTS, key=lambda name: len(siblings_of(name)))
per_package = nox.parametrize(
    "package", [nox.param(name, id=name, tags=[name]) for name in LOWEST_FIRST]
)


# ---------------------------------------------------------------- for everyone


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a small DeepSeek-V3 on two centuries of speeches, and let it write (6 minutes)."""
    install_wheels(session, "ds-train[plot]")
    session.run("ds-train", "quickstart", "--out", "build/quickstart", *session.posargs, env=QUIET)


@nox.session
def serve(session: nox.Session) -> None:
    """Serve the quickstart's model, with a page at http://127.0.0.1:8000; trains it if need be."""
    install_wheels(session, "ds-train[plot]", "ds-serve")
    model = Path("build/quickstart/model")
    if not (model / "config.json").exists():
        session.run("ds-train", "quickstart", "--out", "build/quickstart", env=QUIET)
    session.run("ds-serve", "serve", str(model), *session.posargs, env=QUIET)


@nox.session(venv_backend="none")
def check(session: nox.Session) -> None:
    """Run everything that CI runs: lint, interfaces, tools, deploy, tests, parity, compat, docs."""
    tests = [f"tests({name})" for name in LOWEST_FIRST]
    compat = [f"compat({name})" for name in LOWEST_FIRST]
    # Each by its full name: nox takes only the first of "tests".
    for name in ("lint", "interfaces", "tools", "deploy", *tests, "parity", *compat, "docs"):
        session.notify(name)


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Make .venv with all six packages editable, every tool, and the commit hooks."""
    session.run(*UV, "venv", "-q", "--allow-existing", "--python", sys.executable, ".venv")
    editable = [f"packages/{name}{tested_extras(name)}" for name in PROJECTS]
    arguments = [word for path in editable for word in ("--editable", path)]
    session.run(*UV, "pip", "install", "-q", "--python", ".venv", "--group", "dev", *arguments)
    scripts = ROOT / ".venv" / ("Scripts" if sys.platform == "win32" else "bin")
    if (ROOT / ".git").exists():
        session.run(str(scripts / "pre-commit"), "install", external=True)
    session.log(f"ready: source {scripts.relative_to(ROOT) / 'activate'}")


# ---------------------------------------------------------------- what CI runs


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, spelling, layers and interfaces on every file, as pre-commit does."""
    session.install("pre-commit>=4")
    session.run("pre-commit", "run", "--all-files", "--show-diff-on-failure", "--color=never")


@nox.session
def interfaces(session: nox.Session) -> None:
    """Compare public names and signatures with the snapshots; `-- --write` refreshes them."""
    session.install(*nox.project.dependency_groups(GROUPS, "tools"))
    session.run("python", "tools/interfaces.py", *session.posargs)


@nox.session
def tools(session: nox.Session) -> None:
    """Test the workshop itself: interface check, layers, releases, what the benchmark computes."""
    session.install(*nox.project.dependency_groups(GROUPS, "tools"))
    # The benchmark counts what they cost, and shows what they plan.
    install_wheels(session, "ds-model", "ds-train[plot]", "ds-serve")
    tests = ("tools/tests", "bench/tests")
    session.run("pytest", "-q", *tests, *report("tools"), *session.posargs, env=QUIET)


@nox.session
def deploy(session: nox.Session) -> None:
    """Check the container file, manifests, alerts and dashboard, each with its own tool."""
    install_wheels(session, "ds-serve")
    session.install(*nox.project.dependency_groups(GROUPS, "deploy"))
    session.run("pytest", "-q", "deploy/tests", *report("deploy"), *session.posargs, env=QUIET)


@nox.session
@per_package
def tests(session: nox.Session, package: str) -> None:
    """Test one package: its wheel, its declared dependencies and nothing else."""
    run_tests(session, package, wheels_for(session, package))


@nox.session
@per_package
def compat(session: nox.Session, package: str) -> None:
    """Test one package beside the oldest versions that its ranges admit, siblings and others."""
    wheels = wheels_for(session, package)
    for name, requirement in siblings_of(package).items():
        released = oldest_release(session, requirement)
        if released is None:
            session.log(f"{requirement}: no release is tagged yet, so the current one stands in")
        else:
            session.log(f"{requirement}: {released.name}")
            wheels[name] = released
    run_tests(session, package, wheels, oldest=True)


@nox.session(venv_backend="venv")
def parity(session: nox.Session) -> None:
    """Compare the model with transformers on torch: logits, gradients, text, training."""
    install_peer(session)
    install_wheels(session, "ds-model", "ds-train[plot]")
    session.run("pytest", "-q", "parity", *report("parity"), *session.posargs, env=TESTED)
    if not session.posargs:  # once more on stock operations, where nothing is compiled
        stock = [f"parity/test_{name}.py" for name in ("forward", "gradients", "plants")]
        session.run("pytest", "-q", *stock, env={**QUIET, "DS_PRECISION_KERNELS": "off"})


@nox.session
def docs(session: nox.Session) -> None:
    """Execute the notebooks, build the site strictly into build/site, run every example in it."""
    install_docs(session)
    session.run("python", "tools/notebooks.py", "run", env=QUIET)
    session.run("pytest", "-q", "tools/tests/test_pages.py", env=QUIET)
    session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})
    pages = ["README.md", "docs", *(f"packages/{name}/README.md" for name in PROJECTS)]
    # Notebooks' sources are Python files, whose docstrings would be looked at by importing them.
    words = ("-q", "--markdown-docs", "--ignore-glob=docs/notebooks/*/*.py")
    session.run("pytest", *words, *pages, *session.posargs, env=QUIET)


# ---------------------------------------------------------------- when you need them


@nox.session(name="docs-serve")
def docs_serve(session: nox.Session) -> None:
    """Show the site at http://127.0.0.1:8000 and rebuild it at each change."""
    install_docs(session)
    draft = {"NO_MKDOCS_2_WARNING": "1", "DS_DOCS_DRAFT": "1"}  # notebooks may lack outputs
    session.run("mkdocs", "serve", *session.posargs, env=draft)


@nox.session(name="docs-publish")
def docs_publish(session: nox.Session) -> None:
    """Put the site on the branch gh-pages as a version: `-- dev`, or `-- --push 0.2 latest`."""
    if not session.posargs:
        session.error("name a version: nox -s docs-publish -- dev")
    install_docs(session)
    session.install("-q", "mike>=2.1,<3")
    session.run("python", "tools/notebooks.py", "run", env=QUIET)
    session.run("mike", "deploy", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def notebooks(session: nox.Session) -> None:
    """Execute the notebooks that changed; `-- --force` for all, `-- PATH` for one."""
    install_docs(session)
    session.run("python", "tools/notebooks.py", "run", *session.posargs, env=QUIET)


@nox.session
def lab(session: nox.Session) -> None:
    """Open the notebooks in JupyterLab, at localhost, behind a token."""
    install_wheels(session, "ds-train[notebook]", "ds-serve")
    # What is safe is Jupyter's own default; said here so that no file of yours turns it off.
    safe = ("--ip=127.0.0.1", "--IdentityProvider.token=" + secrets.token_hex(24))
    session.run("jupyter", "lab", *safe, *session.posargs, "docs/notebooks", env=QUIET)


@nox.session
@per_package
def gpu(session: nox.Session, package: str) -> None:
    """Run one package's tests that are marked `gpu`; says so where there is no GPU."""
    if not Path("/dev/nvidia0").exists():
        session.skip("no NVIDIA GPU on this machine (/dev/nvidia0 is missing)")
    install_wheels(session, f"{package}[gpu]")
    install_test_tools(session, package)
    session.chdir(ROOT / "packages" / package)
    none_marked = 5  # pytest's exit code for "no test selected"
    session.run("pytest", "-q", "-m", "gpu", *session.posargs, success_codes=[0, none_marked])


@nox.session
def bench(session: nox.Session) -> None:
    """Time us beside the peers; `-- --full` for all of them, `-- --guard` for none.

    `-- --serving` times servers under load instead, as the session `serving` does.
    """
    install_wheels(session, "ds-model", "ds-train[plot]", "ds-serve")
    # Each peer gets an environment of its own beside this session's, and keeps it.
    peers = str(Path(session.virtualenv.location).parent)
    words = [word for word in session.posargs if word != "--serving"]
    module = "bench.serving" if len(words) < len(session.posargs) else "bench"
    session.run("python", "-m", module, "--environments", peers, *words, env=QUIET)


@nox.session
def serving(session: nox.Session) -> None:
    """Time servers under load beside the peers, and our engine beside itself (an hour)."""
    install_wheels(session, "ds-train[plot]", "ds-serve")
    peers = str(Path(session.virtualenv.location).parent)
    words = ["--environments", peers, *session.posargs]
    session.run("python", "-m", "bench.serving", *words, env=QUIET)


@nox.session
def precision(session: nox.Session) -> None:
    """Train `mini` in FP8, BF16 and float32 on the same batches; goes on where it stopped."""
    install_wheels(session, "ds-train[plot]")
    session.run("python", "-m", "bench.precision", *session.posargs, env=QUIET)


@nox.session
def balance(session: nox.Session) -> None:
    """Train `mini` balanced by a bias, by a loss and not at all; goes on where it stopped."""
    install_wheels(session, "ds-train[plot]")
    session.run("python", "-m", "bench.balance", *session.posargs, env=QUIET)


@nox.session
def ranks(session: nox.Session) -> None:
    """Measure training on many ranks, as processes here: time, bytes, idle time."""
    install_wheels(session, "ds-train[plot]")
    session.run("python", "-m", "bench.ranks", *session.posargs, env=QUIET)


@nox.session
def ray(session: nox.Session) -> None:
    """Test ranks that Ray starts, and starts anew; needs the extra `ray`, which is large."""
    install_wheels(session, "ds-train[ray]")
    session.install(*nox.project.dependency_groups(GROUPS, "test"))
    session.run("pytest", "-q", "packages/ds-train/tests/test_ray.py", env=QUIET)


@nox.session
def conversion(session: nox.Session) -> None:
    """Convert gigabytes of FP8, beside a plain copy: memory and time (12 GB of disk)."""
    install_wheels(session, "ds-model", "ds-train[plot]")
    session.run("python", "-m", "bench.conversion", *session.posargs, env=QUIET)


@nox.session
def quantization(session: nox.Session) -> None:
    """Score, size and time small weights beside llama.cpp's, on a trained `mini`."""
    install_wheels(session, "ds-model", "ds-train[plot]")
    peers = str(Path(session.virtualenv.location).parent)
    words = ["--environments", peers, *session.posargs]
    session.run("python", "-m", "bench.quantization", *words, env=QUIET)


@nox.session
def release(session: nox.Session) -> None:
    """Release one package: `nox -s release -- ds-moe minor` (or major, patch)."""
    session.install(*nox.project.dependency_groups(GROUPS, "tools"))
    session.run("python", "tools/release.py", *session.posargs)


# ---------------------------------------------------------------- how they do it


def wheels_for(session: nox.Session, *packages: str) -> dict[str, Path]:
    """Return the wheels of packages and their siblings, each built once a nox run."""
    names = set(packages).union(*map(siblings_of, packages))
    for name in names - BUILT.keys():
        BUILT[name] = build(session, ROOT / "packages" / name, DIST)
    return {name: BUILT[name] for name in names}


def build(session: nox.Session, source: Path, out: Path) -> Path:
    """Build the wheel of the package in `source` into `out` and return its path."""
    stem = source.name.replace("-", "_")
    for old in out.glob(f"{stem}-*.whl"):
        old.unlink()
    session.run(*UV, "build", "-q", "--wheel", "--out-dir", str(out), str(source), external=True)
    return next(out.glob(f"{stem}-*.whl"))


def install_wheels(
    session: nox.Session,
    *wanted: str,
    wheels: dict[str, Path] | None = None,
    options: Sequence[str] = (),
) -> None:
    """Install packages from wheels built here, and their siblings never from anywhere else.

    Args:
        session: the session whose environment is filled.
        wanted: package names, each with extras or without, such as "ds-train[plot]".
        wheels: the wheel of each package; built from the working tree where not given.
        options: more words for the installer.
    """
    names = {name.partition("[")[0]: name for name in wanted}
    wheels = wheels or wheels_for(session, *names)
    pins = Path(session.create_tmp()) / "siblings.txt"
    pins.write_text("".join(f"{name} @ {path.as_uri()}\n" for name, path in wheels.items()))
    # The version does not change with the sources, so drop what the last run left here.
    here = ("--python", python_of(session))
    session.run(*UV, "pip", "uninstall", "-q", *here, *wheels, external=True)
    targets = [f"{target} @ {wheels[name].as_uri()}" for name, target in names.items()]
    # uv here in every session, so that those which sit on pip share its cache of hard links too.
    add = ("pip", "install", "-q", *here, *options, "--constraint", str(pins))
    session.run(*UV, *add, *targets, external=True)


def python_of(session: nox.Session) -> str:
    """Return the path of the session's own interpreter."""
    folder = Path(session.virtualenv.location)
    windows = folder / "Scripts" / "python.exe"
    return str(windows if windows.exists() else folder / "bin" / "python")


def oldest_release(session: nox.Session, requirement: Requirement) -> Path | None:
    """Return the wheel of the oldest tagged release that a range admits, or None."""
    name = requirement.name
    listing = session.run("git", "tag", "--list", f"{name}-v*", silent=True, external=True)
    versions = sorted(Version(tag.removeprefix(f"{name}-v")) for tag in str(listing).split())
    oldest = next(iter(requirement.specifier.filter(versions)), None)
    if oldest is None:
        return None
    folder = ROOT / ".nox" / "released" / f"{name}-v{oldest}"
    if not folder.exists():
        source = Path(session.create_tmp()) / name
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        folder.mkdir(parents=True)
        tree = f"{name}-v{oldest}:packages/{name}"
        session.run("git", "archive", "-o", str(source / "tree.tar"), tree, external=True)
        shutil.unpack_archive(source / "tree.tar", source, filter="data")
        build(session, source, folder)
    return next(folder.glob("*.whl"))


def run_tests(
    session: nox.Session, package: str, wheels: dict[str, Path], *, oldest: bool = False
) -> None:
    """Install one package's wheel beside the given siblings' wheels, and test it alone.

    Args:
        session: the session whose environment is filled.
        package: the package to test.
        wheels: its own wheel and its siblings'.
        oldest: take the lowest version that each declared range admits, not the highest.
    """
    project = PROJECTS[package]
    optional = [
        line
        for name, lines in project["optional-dependencies"].items()
        if name in TESTED_EXTRAS
        for line in lines
    ]
    declared = [line for line in project["dependencies"] + optional if not line.startswith("ds-")]
    install_test_tools(session, package)
    options = ("--upgrade", "--resolution", "lowest-direct", *declared) if oldest else ()
    install_wheels(session, package + tested_extras(package), wheels=wheels, options=options)
    session.chdir(ROOT / "packages" / package)  # src layout: only the wheel can be imported
    session.run("deptry", "src", silent=True)
    coverage = [
        f"--cov={package.replace('-', '_')}",
        f"--cov-config={ROOT / 'pyproject.toml'}",
        f"--cov-fail-under={COVERAGE}",
    ]
    few = ("-m", "not gpu and not ranks")
    found = few if oldest else (*coverage, *report(f"tests({package})"))
    # The same examples every time: a new one that fails is found where someone looks for it.
    found = ("--hypothesis-profile=ci", *found)
    session.run("pytest", "-q", *found, *session.posargs, env=TESTED)


def report(name: str) -> tuple[str, ...]:
    """Return what makes pytest write the report of a session, for the site's page of progress."""
    slug = name.replace("(", "-").replace(")", "")
    return (f"--junitxml={ROOT / 'build' / 'reports' / slug}.xml",)


def tested_extras(package: str) -> str:
    """Return the extras that a package's tests need, in brackets."""
    extras = [name for name in TESTED_EXTRAS if name in PROJECTS[package]["optional-dependencies"]]
    return f"[{','.join(extras)}]" if extras else ""


def install_test_tools(session: nox.Session, package: str) -> None:
    """Install pytest and the rest of group `test`, and the package's own group if it has one."""
    own = {f"test-{package}"} & GROUPS["dependency-groups"].keys()
    session.install("-q", *nox.project.dependency_groups(GROUPS, "test", *own))


def install_peer(session: nox.Session) -> None:
    """Install torch and what stands on it with pip, then transformers."""
    # uv and Poetry would fetch torch's CUDA build, three gigabytes, where pip can be given one for
    # the CPU. So torch, and what needs it, is in no dependency group and in no lock.
    torch = ("torch==2.13.0", "accelerate>=1", "compressed-tensors>=0.20,<0.21")
    session.install("-q", "--prefer-binary", *torch)  # without accelerate no FP8 is opened
    here = ("--python", python_of(session), "--group", "parity")
    session.run(*UV, "pip", "install", "-q", *here, external=True)


def install_docs(session: nox.Session) -> None:
    """Install what the site and its examples need."""
    session.install("-q", *nox.project.dependency_groups(GROUPS, "docs"))
    install_wheels(session, "ds-train[notebook]", "ds-serve")


if __name__ == "__main__":
    nox.main()
