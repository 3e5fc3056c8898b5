"""Project structure: which part may import which, and versions that must agree between files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rsb_ffcv"
MAY_IMPORT = {
    "ops": set(),
    "learning": set(),
    "reporting": {"atomic", "config"},
    "gpu": {"ops"},
    "loading": {"ops", "beton", "gpu"},
    "dataset": {"ops", "beton", "atomic", "preprocessing"},
    "preprocessing": set(),
    "ffcv": {"ops", "beton", "loading"},
    "beton": {"ops", "atomic"},
    "config": set(),
    "atomic": set(),
    "training": {
        "ops",
        "loading",
        "learning",
        "reporting",
        "config",
        "atomic",
        "beton",
    },
    "export": {"loading", "learning"},
    "commands": {
        "training",
        "export",
        "preprocessing",
        "learning",
        "dataset",
        "gpu",
        "loading",
        "reporting",
        "ops",
        "config",
        "atomic",
        "beton",
    },
}


def imported_names(path: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_parts(path: Path) -> set[str]:
    """The parts of rsb_ffcv that a file imports."""
    return {
        name.split(".")[1] for name in imported_names(path) if name.startswith("rsb_ffcv.")
    } & set(MAY_IMPORT)


def test_each_part_imports_only_the_parts_below_it():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            extra = imported_parts(path) - MAY_IMPORT[part] - {part}
            assert not extra, f"{path} imports {extra}"


def test_console_scripts_call_the_functions_of_the_programs():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, place in scripts.items():
        module, _, function = place.partition(":")
        assert f"{module}.{function}" in imported_names(ROOT / f"{name}.py")
    assert set(scripts) == {"write_ffcv", "train_imagenet"}


# draws.py takes the address of a draw (seed, epoch, slot, op, k); ColorJitter has torchvision's
# signature, the Loader of rsb_ffcv.ffcv has FFCV's, and kernels.py and operations.py beside it have
# functions that numba or FFCV call. Functions compiled by numba are exempt as well: they have no
# keyword-only parameters
MAY_HAVE_MORE_POSITIONAL = {"draws.py", "ColorJitter", "Loader", "kernels.py", "operations.py"}


def test_at_most_three_parameters_are_positional():
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        owners = {
            method.lineno: node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for method in node.body
        }
        for node in ast.walk(tree):
            decorators = " ".join(ast.dump(item) for item in getattr(node, "decorator_list", []))
            if isinstance(node, ast.FunctionDef) and not re.search("'njit'|'cfunc'", decorators):
                names = [item.arg for item in node.args.args if item.arg not in ("self", "cls")]
                owner = owners.get(node.lineno, "")
                if len(names) > 3 and not {path.name, owner} & MAY_HAVE_MORE_POSITIONAL:
                    found.append(f"{path}: {owner} {node.name}{names}")
            if isinstance(node, ast.ClassDef) and "dataclass" in decorators:
                count = sum(isinstance(item, ast.AnnAssign) for item in node.body)
                if count > 3 and "kw_only" not in decorators:
                    found.append(f"{path}: {node.name}")
    assert not found, found


def test_import_rules_cover_every_part():
    parts = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set(MAY_IMPORT)


def test_no_circular_imports():
    """Directly or indirectly, anywhere in a file."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    del modules["rsb_ffcv"]  # it imports the library's names on first use
    imports = {}
    for module, path in modules.items():
        names = imported_names(path)
        parents = {name.rpartition(".")[0] for name in names - modules.keys()}
        imports[module] = ((names | parents) & modules.keys()) - {module}
    while imports:
        free = [module for module, others in imports.items() if not others & imports.keys()]
        assert free, f"these import each other in a circle: {sorted(imports)}"
        for module in free:
            del imports[module]


def test_only_one_part_imports_ffcv():
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        imports = {name for name in imported_names(path) if name.split(".")[0] == "ffcv"}
        assert not imports or path.parent == PACKAGE / "ffcv", f"{path} imports {imports}"


def test_a_run_writes_through_its_lease_only():
    """A plain write would change the folder of a run that another process has taken over."""
    methods = {"write_text", "write_bytes", "unlink", "touch", "rename", "rmtree", "copyfile"}
    methods |= {"symlink_to", "hardlink_to", "rmdir"}
    found = []
    for path in [*(PACKAGE / "training").glob("*.py"), *(PACKAGE / "reporting").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.name == "lease.py":
                continue
            call = ast.unparse(node)
            name = call.partition("(")[0]
            opens = name == "open" and not re.search(r"\[?'rb?'\]?\)$|^open\([^,]*\)$", call)
            if opens or name.rpartition(".")[2] in methods - {name} or name == "os.replace":
                found.append(f"{path.name}: {call}")
    assert sorted(found) == [
        "checkpoint.py: open(earlier, 'r+b')",  # for its lock
        # a name of its own, before the process has a lease
        "copies.py: own.touch()",
        "copies.py: own.unlink()",
    ]


def test_training_imports_no_slow_module_it_does_not_need():
    slow = ("ffcv", "cv2", "matplotlib")
    code = f"""
import sys, rsb_ffcv.training.trainer
print([name for name in {slow} if name in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_library_names_are_documented_and_imported_on_first_use():
    code = """
import sys, rsb_ffcv
assert not {"torch", "numpy", "numba"} & set(sys.modules)
print({name: getattr(rsb_ffcv, name).__module__ for name in rsb_ffcv.__all__})
assert set(rsb_ffcv.__all__) <= set(dir(rsb_ffcv)) and not hasattr(rsb_ffcv, "TrainLoder")"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    documented = (ROOT / "docs" / "loader.md").read_text()
    for name in ast.literal_eval(done.stdout):
        assert f"`{name}" in documented, name


def test_conda_and_pip_install_the_same_versions():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(line.split("==") for line in environment["dependencies"][-1]["pip"])
    # conda resolves ffcv's requirement; set_up.sh replaces it with the headless build of the same
    # module
    conda["opencv-python-headless"] = conda.pop("opencv-python")
    assert conda == pinned


def test_pinned_versions_satisfy_pyproject():
    import tomllib

    from packaging.requirements import Requirement

    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        text
        for name in ("ffcv", "export", "test", "dev")
        for text in project["optional-dependencies"][name]
    ]  # the others are not installed by the set-up
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name]), text
    torch = next(Requirement(text) for text in project["dependencies"] if text.startswith("torch>"))
    assert not torch.specifier.contains("2.13.0")


def test_python_versions_agree_in_all_files():
    import tomllib

    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text]
    allowed = SpecifierSet(project["requires-python"])
    assert named == [
        version for version in (f"3.{minor}" for minor in range(30)) if allowed.contains(version)
    ]
    listed = f"{', '.join(named[:-1])} or {named[-1]}"
    set_up = (ROOT / "set_up.sh").read_text()
    assert (
        f'supported="{" ".join(reversed(named))}"' in set_up and f"needs Python {listed} " in set_up
    )
    assert (
        f"On Debian with Python {listed} (the suite passes on each)"
        in (ROOT / "README.md").read_text()
    )
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][0].removeprefix("python=") in named


def test_files_of_the_core_have_no_circular_calls():
    """Also: setup.py lists every source, and every header as a dependency."""
    folder = PACKAGE / "ops" / "csrc"
    sources = {path.stem: path.read_text() for path in folder.glob("*.c")}
    # The functions of a header of hot loops belong to the one file that includes it, directly, as
    # HOT_FILE, or through another such header
    headers = {path.name: path.read_text() for path in folder.glob("*_hot.h")}
    while headers:
        owners = {
            header: [name for name, text in sources.items() if f'"{header}"' in text]
            for header in headers
        }
        header, (owner,) = next((header, found) for header, found in owners.items() if found)
        sources[owner] += headers.pop(header)
    home = {
        function: name
        for name, text in sources.items()
        for function in re.findall(r"^\w[\w *]*?\b(rsb_\w+)\([^;]*?\) ?\{", text, re.M | re.S)
    }
    calls = {
        name: {home[word] for word in re.findall(r"\brsb_\w+", text) if word in home} - {name}
        for name, text in sources.items()
    }
    assert calls["sample"] == {"scratch", "checksum", "jpeg", "resample"}
    while calls:
        free = [name for name, others in calls.items() if not others & calls.keys()]
        assert free, f"these call each other in a circle: {calls}"
        for name in free:
            del calls[name]
    listed = (ROOT / "setup.py").read_text().partition("HEADERS = (")
    assert all(f'"{path.stem}"' in listed[0] for path in folder.glob("*.c"))
    for path in folder.rglob("*.h"):
        assert f'"{path.relative_to(folder).with_suffix("")}"' in listed[2], path


def test_every_instruction_set_of_the_core_is_looked_for_at_run_time():
    folder = PACKAGE / "ops" / "csrc"
    code = "".join(path.read_text() for path in sorted(folder.glob("*.[ch]")))
    used = {name for names in re.findall(r'target\("([^"]+)"\)', code) for name in names.split(",")}
    assert used == set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', code))
