"""Installs the recipes of configs/ as odelm.recipes, so that `--config=tiny` finds them without a checkout."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["odelm*"]), "odelm.recipes"], package_dir={"odelm.recipes": "configs"})
