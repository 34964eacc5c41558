"""A plugin: the process of a client dies, once, at each line of a file."""

from masksl.methods.split.client import CLIENT
from tests.kill import make_mortal

make_mortal(CLIENT)
