"""English. The forbidden words are those of Stanford Alpaca; the wording is ours."""

from selfinstruct.languages.base import Language, Wording

_RULES = """\
- No two tasks alike, and none like the examples: another subject, another verb, another kind of answer each time.
- Mix commands and questions, and all kinds of work: writing, rewriting, extracting, sorting into classes, reasoning, \
calculating, coding, planning, explaining, comparing, conversation.
- A text-only assistant must be able to do it: nothing to look at or listen to, no browsing, no action in the world, \
nothing that depends on today's date.
- Write in English. An instruction is one or two sentences."""

ENGLISH = Language(
    code="en",
    name="English",
    labels=("Instruction", "Input", "Output"),
    no_input="<noinput>",
    forbidden_words=(
        "image",
        "images",
        "graph",
        "graphs",
        "picture",
        "pictures",
        "file",
        "files",
        "map",
        "maps",
        "draw",
        "plot",
        "go to",
        "video",
        "audio",
        "music",
        "flowchart",
        "diagram",
    ),
    forbidden_starts=("Write a program",),
    start="ascii",
    open_words=frozenset("a an the of and or but because than whose if while their its our your my these".split()),
    wording=Wording(
        numbered=f"""\
Invent {{count}} new tasks for teaching a text assistant, each with a model answer.

{_RULES}
- When a task needs something to work on, give it as the input: real-looking and specific, never a placeholder, at \
most 100 words. When it needs nothing, the input is <noinput>.
- The output is a correct and complete answer in at most 100 words.

Keep exactly to the form of the examples: numbered labels, and a line with ### between tasks.

Tasks:
""",
        continue_numbered="""

Write tasks {first} to {last} now, in the same form, and nothing else.""",
        schema=f"""\
Invent {{count}} new tasks for teaching a text assistant, each with a model answer. Answer with JSON only: \
{{{{"tasks": [{{{{"instruction": ..., "input": ..., "output": ...}}}}, ...]}}}}

{_RULES}
- When a task needs something to work on, give it as the input: real-looking and specific, never a placeholder, at \
most 100 words. When it needs nothing, the input is "".
- The output is a correct and complete answer in at most 100 words.

Examples:
""",
        short="Different tasks for an assistant, with their answers, one JSON object a line:\n",
    ),
)
