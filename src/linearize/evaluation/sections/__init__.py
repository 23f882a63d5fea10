"""The parts of an evaluation, a folder each, and the literal table of them, in the order of a report."""

from linearize.evaluation.context import Section
from linearize.evaluation.sections.branches import Branches
from linearize.evaluation.sections.chat import Chat
from linearize.evaluation.sections.cloze import Cloze
from linearize.evaluation.sections.consistency import Consistency
from linearize.evaluation.sections.language import Language
from linearize.evaluation.sections.layers import Layers
from linearize.evaluation.sections.recall import Recall
from linearize.evaluation.sections.speed import Speed
from linearize.evaluation.sections.tasks import Tasks

SECTIONS: dict[str, type[Section]] = {
    section.NAME: section for section in (Consistency, Language, Branches, Layers, Cloze, Recall, Tasks, Chat, Speed)
}
