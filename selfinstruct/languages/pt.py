"""Portuguese: words that ask for more than text, with inflections, and our own wording."""

from selfinstruct.languages.base import Language, Wording

_RULES = """\
- Nenhuma tarefa parecida com outra nem com os exemplos: outro assunto, outro verbo, outro tipo de resposta a cada vez.
- Misture ordens e perguntas e todo tipo de trabalho: escrever, reescrever, extrair, classificar, raciocinar, \
calcular, programar, planejar, explicar, comparar, dialogar.
- Um assistente que só lê e escreve texto deve conseguir cumpri-la: nada para ver ou ouvir, nenhuma navegação, nenhuma \
ação no mundo, nada que dependa da data de hoje.
- Escreva em português. Uma instrução tem uma ou duas frases."""

PORTUGUESE = Language(
    code="pt",
    name="Portuguese",
    labels=("Instrução", "Entrada", "Saída"),
    no_input="<sem entrada>",
    forbidden_words=(
        "imagem",
        "imagens",
        "foto",
        "fotos",
        "fotografia",
        "fotografias",
        "figura",
        "figuras",
        "gráfico",
        "gráficos",
        "mapa",
        "mapas",
        "desenhe",
        "desenhar",
        "desenho",
        "desenhos",
        "arquivo",
        "arquivos",
        "ficheiro",
        "ficheiros",
        "vídeo",
        "vídeos",
        "áudio",
        "áudios",
        "música",
        "músicas",
        "diagrama",
        "diagramas",
        "fluxograma",
        "fluxogramas",
        "vá para",
    ),
    forbidden_starts=("Escreva um programa", "Crie um programa"),
    start="letter",
    open_words=frozenset(
        "o a os as um uma de do da dos das no na nos nas pelo pela e ou mas porque cujo cuja seu sua seus suas ao à "
        "aos às".split()
    ),
    wording=Wording(
        numbered=f"""\
Invente {{count}} tarefas novas para ensinar um assistente de texto, cada uma com uma resposta exemplar.

{_RULES}
- Quando a tarefa precisar de material, dê-o na entrada: realista e específico, nunca um marcador a preencher, com no \
máximo 100 palavras. Quando não precisar de nada, a entrada é <sem entrada>.
- A saída é uma resposta correta e completa com no máximo 100 palavras.

Siga exatamente a forma dos exemplos: rótulos numerados e uma linha com ### entre as tarefas.

Tarefas:
""",
        continue_numbered="""

Escreva agora as tarefas de {first} a {last}, na mesma forma, e nada mais.""",
        schema=f"""\
Invente {{count}} tarefas novas para ensinar um assistente de texto, cada uma com uma resposta exemplar. Responda \
somente com JSON: {{{{"tasks": [{{{{"instruction": ..., "input": ..., "output": ...}}}}, ...]}}}}

{_RULES}
- Quando a tarefa precisar de material, dê-o na entrada: realista e específico, nunca um marcador a preencher, com no \
máximo 100 palavras. Quando não precisar de nada, a entrada é "".
- A saída é uma resposta correta e completa com no máximo 100 palavras.

Exemplos:
""",
        short="Tarefas diferentes para um assistente, com as respostas, um objeto JSON por linha:\n",
    ),
)
