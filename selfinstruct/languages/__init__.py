"""Language packs: labels, word lists and prompt wording for the tasks that are generated."""

from selfinstruct.languages.base import Language, Wording
from selfinstruct.languages.en import ENGLISH
from selfinstruct.languages.pt import PORTUGUESE

LANGUAGES: dict[str, Language] = {pack.code: pack for pack in (ENGLISH, PORTUGUESE)}

__all__ = ["LANGUAGES", "Language", "Wording"]
