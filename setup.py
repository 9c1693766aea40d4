"""Package metadata, read from settings.ini so that it stands in one place."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
s = config["DEFAULT"]
name, readme = s["lib_name"], here / "README.md"

setup(
    name=name,
    version=s["version"],
    description=s["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license=s["license"],
    author=s["author"],
    keywords=s["keywords"].split(),
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=[name, f"{name}.*"]),
    package_data={name: ["conf/*.yaml", "conf/**/*.yaml", "templates/*"]},
    install_requires=s["requirements"].split(),
    extras_require={k: s[f"{k}_requirements"].split() for k in ("lab", "export", "app", "serve", "scale", "dev")},
    entry_points={"console_scripts": s["console_scripts"].split(), "nbdev": [f"{name}={name}._modidx:d"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Image Recognition"],
)
