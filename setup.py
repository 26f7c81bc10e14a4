"Thin by design: every value lives in settings.ini."

import json
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {
    name.removesuffix("_requirements"): words.split() for name, words in cfg.items() if name.endswith("_requirements")
}
extras["all"] = sorted(
    {word for name, words in extras.items() if name not in ("dev", "browser", "trackers", "docs") for word in words}
)


def without_outputs(path):
    "The pictures in the notebooks of a clone weigh more than the package; who executes a notebook gets them."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class BuildWithNotebooks(build_py):
    "The wheel carries the notebooks and sweeps that people execute, below zsad_nb/notebooks; a clone has them in nbs."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in ("experiments", "tutorials"):
            target = Path(self.build_lib) / cfg["lib_path"] / "notebooks" / name
            ignored = shutil.ignore_patterns(".ipynb_checkpoints", "_*")
            shutil.copytree(root / cfg["nbs_path"] / name, target, ignore=ignored, dirs_exist_ok=True)
            for notebook in target.rglob("*.ipynb"):
                without_outputs(notebook)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["assets/*", "py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "papermill.io": ["zsad://=zsad_nb.runs.library:PackageNotebooks"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
