"""What pyproject.toml cannot state: the folder `configs/` is installed within the package."""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=["unigrpo_jax*"]), "unigrpo_jax.configs"],
  package_dir={"unigrpo_jax.configs": "configs"},
)
