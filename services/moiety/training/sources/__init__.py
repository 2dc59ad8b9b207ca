"""The sources of all texts, by domain. Each has a permissive licence, or is in the public domain, and its package says so."""

from moiety.training.sources.english import ENGLISH
from moiety.training.sources.french import FRENCH
from moiety.training.sources.german import GERMAN
from moiety.training.sources.python import PYTHON
from moiety.training.sources.shell import SHELL
from moiety.training.sources.spanish import SPANISH

SOURCES = (*ENGLISH, *GERMAN, *FRENCH, *SPANISH, *PYTHON, *SHELL)
