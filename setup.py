"""What pyproject.toml cannot say: two folders of configurations at the root of a checkout are data of `pipeline`."""

from setuptools import find_namespace_packages, setup

OUTSIDE = {f"pipeline.{name}": name for name in ("accelerate_configs", "ds_configs")}

setup(packages=[*find_namespace_packages(include=["pipeline*", "data_prep*"]), *OUTSIDE], package_dir=OUTSIDE)
