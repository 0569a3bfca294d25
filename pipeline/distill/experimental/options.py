"""Lists the options of a phase that the settings switch on. All are off by default."""

from pipeline.core.config import Config
from pipeline.distill.experimental.hook import Option
from pipeline.distill.experimental.intents import Intents
from pipeline.distill.experimental.session_summaries import SessionSummaries
from pipeline.distill.experimental.soft_targets import SoftTargets, Teacher
from pipeline.distill.experimental.token_distillation import TokenDistillation
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts


def phase_options(
    phase: str, config: Config, prompts: Prompts, processor: PromptProcessor, teacher: Teacher | None, summaries: dict[str, str]
) -> list[Option]:
    transfer, align = config.distill.transfer, config.distill.align
    options: list[Option] = []
    if phase == "transfer":
        if transfer.summary:
            options.append(SessionSummaries(summaries, transfer.items, transfer.summary))
        if transfer.intent:
            options.append(Intents(prompts, processor, transfer.intent))
        if teacher is not None:
            options.append(SoftTargets(teacher, transfer.items, transfer.soft))
    if phase == "align" and align.token_distill:
        options.append(TokenDistillation(align.token_distill))
    return options
