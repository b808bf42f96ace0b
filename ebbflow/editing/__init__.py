"""Editing: change what a picture shows through the noise that makes it."""

from ebbflow.editing.classify import classify as classify
from ebbflow.editing.edit import Edit as Edit
from ebbflow.editing.edit import Kept as Kept
from ebbflow.editing.edit import edit as edit
from ebbflow.editing.interpolate import interpolate as interpolate
from ebbflow.editing.interpolate import spherical as spherical
from ebbflow.editing.null_text import NullText as NullText
from ebbflow.editing.null_text import null_text as null_text
