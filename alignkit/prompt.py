"""Prompts as Jinja templates of the configuration: the text is part of the settings, so of the run's signature and record."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import StrictUndefined, TemplateError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignkit.errors import UserError, suggest

_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


@dataclass(kw_only=True)
class Prompt:
    """A chat prompt: one user turn, and a system turn where there is one, from a Jinja template over named texts."""

    template: str  # of the user turn
    system: str | None = None  # template of the system turn; null: none
    version: int = 1  # counted up when a shipped prompt changes

    def __post_init__(self) -> None:
        for key in ("template", "system"):
            text = getattr(self, key)
            try:
                _JINJA.parse(text or "")
            except TemplateError as e:
                raise ValueError(f"prompt.{key} is not a Jinja template: {e}") from None
        if not self.template.strip():
            raise ValueError("prompt.template is empty")

    @property
    def names(self) -> set[str]:
        """The texts that the templates ask for."""
        return {
            name
            for text in (self.template, self.system or "")
            for name in meta.find_undeclared_variables(_JINJA.parse(text))
        }

    def messages(self, **texts: str) -> list[dict[str, str]]:
        """The rendered turns.

        Raises:
            UserError: the template asks for a name that is not among ``texts``.
        """
        turns = [("system", self.system)] if self.system is not None else []
        return [
            {"role": role, "content": self._rendered(text, texts)} for role, text in [*turns, ("user", self.template)]
        ]

    def _rendered(self, text: str, texts: dict[str, str]) -> str:
        try:
            return _JINJA.from_string(text).render(texts)
        except UndefinedError:
            unknown = sorted(meta.find_undeclared_variables(_JINJA.parse(text)) - set(texts))
            raise UserError(
                f"the prompt template asks for '{unknown[0] if unknown else '?'}'.{suggest(unknown[0] if unknown else '', texts)}"
            ) from None
        except TemplateError as e:
            raise UserError(f"the prompt template cannot be filled in: {e}") from None
