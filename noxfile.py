"""A short suite, of the files that touch what depends on versions, for each pair of them: `nox`.

The whole suite runs on one pair, by `make test` and `make test-all`.
"""

import sys

import nox

nox.options.reuse_existing_virtualenvs = True

PLAIN = ["pyro-ppl", "numpy", "scipy", "tqdm", "arviz-stats", "arviz", "matplotlib", "scikit-learn", "joblib"]
PLAIN += ["h5netcdf", "h5py", "pyarrow"]
TOOLS = ["pytest==9.2.0", "pytest-xdist", "hypothesis"]
SHORT = [
    "tests/_compile/test_draw_order.py",
    "tests/_compile/test_svi.py",
    "tests/_program",
    "tests/autoguide/test_contract.py",
    "tests/autoguide/test_state.py",
    "tests/diagnostics/test_arviz_export.py",
    "tests/test_command_line.py",
    "tests/test_data_files.py",
    "tests/transforms/test_conditional.py",
    "pyro_flowvi/psis.py",
    "pyro_flowvi/numerics.py",
]


def run(session: nox.Session) -> None:
    """The short suite against the package where it stands."""
    session.install("--no-deps", "--editable", ".")
    session.run("python", "-W", "ignore", "-c", "import pyro.infer.reparam, pyro.contrib.forecast")
    # On Windows Inductor finds a C++ compiler only in Visual Studio's prompt: steps stay eager elsewhere.
    here = [path for path in SHORT if not (sys.platform == "win32" and path.startswith("tests/_compile"))]
    short = session.posargs or here
    session.run(
        "python", "-m", "pytest", "--quiet", "--numprocesses", "2", *short, env={"OMP_NUM_THREADS": "1"}
    )


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("torch", ["2.11.0", "2.12.0", "2.13.0", "2.14.1"])
def torch(session: nox.Session, torch: str) -> None:
    """Versions of torch and of Python, with the newest of all else: ArviZ 0.x on 3.11, 1.x from 3.12 on."""
    session.install(f"torch=={torch}", *PLAIN, *TOOLS)
    run(session)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Every lower bound of setup.cfg at once."""
    session.install("--constraint", "constraints-lowest.txt", "torch", *PLAIN, *TOOLS)
    run(session)
