"""Opens the parts of a bundle that only some calls need."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from trimode.errors import UsageError
from trimode.formats.hints import TRAIN_SAMPLER
from trimode.formats.manifest import SamplerRecord
from trimode.runtime.auto.timings import Timings, find_timings, subject_of
from trimode.runtime.bundle.open import Bundle
from trimode.runtime.decode.options import DecodeOptions
from trimode.runtime.decode.unmasking import Scorer
from trimode.runtime.grammar.compile import CompiledOutputs, GrammarCompiler
from trimode.runtime.grammar.vocabulary import Vocabulary
from trimode.runtime.text.codec import TextCodec


class BundleParts:
    """Opens each part at its first use, and keeps it.

    Args:
        bundle: Opened bundle.
        target: Name of the target that runs.
        num_threads: Threads inside one operator on the CPU; None = the library's choice.
        timings: Table that mode ``auto`` uses; None = the one that this machine keeps.
    """

    def __init__(
        self, bundle: Bundle, target: str, num_threads: int | None, timings: Timings | None
    ) -> None:
        self.bundle, self.target, self.num_threads = bundle, target, num_threads
        self._given_timings = timings

    @cached_property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template; :class:`UsageError` where the bundle has none."""
        return TextCodec(self.bundle.path)

    @cached_property
    def timings(self) -> Timings | None:
        """Table that mode ``auto`` uses; None where there is none."""
        subject = subject_of(self.bundle, self.target, self.num_threads)
        return find_timings(subject, self._given_timings)

    @cached_property
    def scorer(self) -> Scorer:
        """Learned sampler; :class:`UsageError` where the bundle has none."""
        # ONNX Runtime is an optional extra, which a TensorRT target does without
        from trimode.runtime.decode.learned_sampler import LearnedScorer

        return LearnedScorer(self.bundle.path / self.sampler_record.file, self.num_threads)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """What compiles grammars; :class:`UsageError` where the bundle has no tokenizer.

        Raises:
            DependencyError: llguidance is not installed.
        """
        return GrammarCompiler(Vocabulary(self.codec.tokenizer, self.bundle.manifest.model))

    def with_grammar(self, options: DecodeOptions) -> DecodeOptions:
        """Compile the grammar of checked options, if they have one.

        Raises:
            UsageError: it is wrong or too complex, or the bundle has no tokenizer.
            DependencyError: llguidance is not installed.
        """
        asked = options.structured_outputs
        if asked is None or isinstance(asked, CompiledOutputs):
            return options
        return replace(options, structured_outputs=self.grammars.compile(asked))

    @property
    def sampler_record(self) -> SamplerRecord:
        """Manifest entry of the learned sampler; :class:`UsageError` where it has none."""
        record = self.bundle.manifest.sampler
        if record is None:
            raise UsageError(
                "expected a bundle with a learned sampler, found one without",
                f"{TRAIN_SAMPLER}, and add it: "
                "`trimode build CHECKPOINT -o BUNDLE --sampler FOLDER`",
            )
        return record

    def forget_scorer(self) -> None:
        """Give the memory of the learned sampler back."""
        self.__dict__.pop("scorer", None)
