"""The wheel holds compiled kernels, so it is tagged for its platform, but they serve every Python version."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution


class PlatformDistribution(Distribution):
    """A distribution with binaries."""

    def has_ext_modules(self) -> bool:
        """The kernels, although setuptools does not build them."""
        return True


class PlatformWheel(bdist_wheel):
    """Tagged ``py3-none-<platform>``."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=PlatformDistribution, cmdclass={"bdist_wheel": PlatformWheel})
