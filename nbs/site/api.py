"""Pages of the API reference, from the text of the modules: signatures, the comment of every parameter, docstrings.

Read, not imported: the pages need neither PyTorch nor a processor's minute. Comments are docments (fastcore): behind a
parameter, or on the lines above it."""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Module:
    "A generated module and what it says of itself."

    name: str  # zsad_nb.components.vtam
    path: Path
    notebook: str  # nbs/components/07_vtam.ipynb
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


def modules(
    root: Path,  # the repository
) -> dict[str, Module]:  # by name
    "Every module that a notebook exports."
    found = {}
    for path in sorted((root / "zsad_nb").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        match = re.search(r"File to edit: (?:\.\./)+(nbs/\S+?\.ipynb)", source)
        if match:
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name] = Module(name, path, match[1], source)
    return found


def comments_of(
    source: str,  # of a module
) -> dict[int, tuple[str, bool]]:  # line -> its comment, and whether it is alone on the line
    "Comments by line."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("# ").rstrip(), alone)
    return found


def comment_at(
    line: int,  # of a parameter, a field or the end of an annotation
    comments: dict[int, tuple[str, bool]],
) -> str:  # "" where there is none
    "A docment: behind the parameter, or on the lines above it."
    if line in comments and not comments[line][1]:
        return comments[line][0]
    above = []
    line -= 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    return " ".join(above)


def text(
    words: str,  # a docstring or a comment
) -> str:  # for MyST: code stays code, everything else is what it looks like
    "Plain words, in which no character means anything."
    parts = re.split(r"(`[^`\n]+`)", words)
    escaped = [p if p.startswith("`") else re.sub(r"([\\*_<>\[\]$#|{}~^])", r"\\\1", p) for p in parts]
    return "".join(escaped)


def signature(
    node: ast.FunctionDef,
    skip_first: bool = False,  # self or cls
) -> str:  # "(tokens: Tensor, tau: float = 0.07) -> Tensor"
    "A function's parameters with hints and defaults."
    arguments = node.args
    if skip_first:
        arguments = ast.arguments(**{f: getattr(arguments, f) for f in arguments._fields})
        kind = "posonlyargs" if arguments.posonlyargs else "args"
        setattr(arguments, kind, getattr(arguments, kind)[1:])
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def parameters(
    node: ast.FunctionDef,
    comments: dict[int, tuple[str, bool]],
    skip_first: bool = False,
) -> list[str]:  # lines of a field list
    "The comment of every parameter that has one, and of what is returned."
    every = [*node.args.posonlyargs, *node.args.args][skip_first:]
    every += [node.args.vararg] if node.args.vararg else []
    every += node.args.kwonlyargs
    every += [node.args.kwarg] if node.args.kwarg else []
    listed = []
    for argument in every:
        if words := comment_at(argument.lineno, comments):
            stars = "\\*" * (2 * (argument is node.args.kwarg) + (argument is node.args.vararg))
            listed.append(f"    - **{stars}{text(argument.arg)}** – {text(words)}")
    lines = [":Parameters:", *listed] if listed else []
    if node.returns and (words := comment_at(node.returns.end_lineno, comments)):
        if not any(a.lineno == node.returns.end_lineno for a in every):
            lines += [":Returns:", f"    {text(words)}"]
    return lines


def _constant(node: ast.expr | None) -> str:
    "A literal as text; anything else as code."
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return text(node.value)
    return f"`{ast.unparse(node)}`" if node is not None else ""


def _declared(
    value: ast.Call,  # of `param`: default, source, help, by place or by name
) -> tuple[ast.expr | None, str]:  # the default; what the parameter means and where its default comes from
    "A parameter of a method, as its class declares it."
    given = dict(zip(("default", "source", "help"), value.args)) | {k.arg: k.value for k in value.keywords}
    words = [_constant(given.get("help")), f"*Default from:* {_constant(given.get('source'))}"]
    return given.get("default"), "; ".join(filter(None, words))


def fields(
    node: ast.ClassDef,
    comments: dict[int, tuple[str, bool]],
) -> list[str]:  # lines of a list
    "Fields of a dataclass or a parameter set: name, type, default; what it means; where a default comes from."
    lines = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or item.target.id[0] == "_":
            continue
        value, words = item.value, text(comment_at(item.lineno, comments))
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "param":
            value, words = _declared(value)
        shown = f": `{ast.unparse(item.annotation)}`" + (f" = `{ast.unparse(value)}`" if value is not None else "")
        lines.append(f"- **{text(item.target.id)}**{shown}" + (f" – {words}" if words else ""))
    return lines


def _decorators(node) -> list[str]:
    return [ast.unparse(d) for d in node.decorator_list]


def _directive(fence: str, kind: str, head: str, options: list[str], body: list[str]) -> list[str]:
    return [f"{fence}{{py:{kind}}} {head}", *options, "", *body, fence, ""]


def function(
    node: ast.FunctionDef,
    comments: dict[int, tuple[str, bool]],
    of_class: bool = False,
    depth: int = 4,  # backticks of the fence
) -> list[str]:  # lines of MyST
    "A function or method with its docstring and the comments of its parameters."
    names = _decorators(node)
    static = "staticmethod" in names
    kind = "method" if of_class else "function"
    options = [f":{word}method:" for word in ("static", "class") if f"{word}method" in names]
    skip = of_class and not static
    if of_class and any(n.endswith("property") for n in names):
        kind, head = "property", node.name
        options = [f":type: {ast.unparse(node.returns)}"] if node.returns else []
    else:
        head = node.name + signature(node, skip)
    body = [text(ast.get_docstring(node) or ""), "", *parameters(node, comments, skip)]
    return _directive("`" * depth, kind, head.replace("\n", " "), options, body)


def class_(
    node: ast.ClassDef,
    patched: list[ast.FunctionDef],  # methods that later cells add to it
    comments: dict[int, tuple[str, bool]],
) -> list[str]:  # lines of MyST
    "A class: how it is made, its fields, its public methods."
    own = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    made = next((n for n in own if n.name == "__init__"), None)
    head = node.name + (signature(made, True).partition(" -> ")[0] if made else "")
    body = [text(ast.get_docstring(node) or ""), ""]
    if node.bases:
        body += ["Bases: " + ", ".join(f"`{ast.unparse(b)}`" for b in node.bases), ""]
    body += [*(parameters(made, comments, True) if made else []), "", *fields(node, comments), ""]
    for method in [*own, *patched]:
        if not method.name.startswith("_"):
            body += function(method, comments, of_class=True, depth=4)
    return _directive("`" * 5, "class", head.replace("\n", " "), [], body)


def _patched(node: ast.FunctionDef) -> str | None:
    "The class that a function with @patch becomes a method of."
    if not any(re.match(r"patch\b|patch_to\b", d) for d in _decorators(node)):
        return None
    first = [*node.args.posonlyargs, *node.args.args][:1]
    return ast.unparse(first[0].annotation) if first and first[0].annotation else None


def page(
    module: Module,
) -> str:  # MyST
    "The page of a module."
    tree, comments = module.tree, comments_of(module.source)
    listed = next((n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), None)
    names = ast.literal_eval(listed.value) if listed else []
    added: dict[str, list] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (owner := _patched(node)):
            added.setdefault(owner, []).append(node)
    short = module.name.removeprefix("zsad_nb.")
    lines = [f"# {text(short)}", "", text(ast.get_docstring(tree) or ""), ""]
    lines += ["{.about}", f"[The notebook that this module is exported from](../{module.notebook})", ""]
    lines += [f"```{{py:module}} {module.name}", "```", ""]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names and not _patched(node):
            lines += function(node, comments)
        elif isinstance(node, ast.ClassDef) and node.name in names:
            lines += class_(node, added.pop(node.name, []), comments)
    for owner, methods in added.items():  # of a class of another module
        public = [m for m in methods if not m.name.startswith("_")]
        if public:
            lines += [f"## Added to {text(owner)}", ""]
            for method in public:
                method.name = f"{owner}.{method.name}" if "." not in owner and "|" not in owner else method.name
                lines += function(method, comments, of_class=True)
    return "\n".join(lines) + "\n"


def summary(
    module: Module,
) -> str:  # the first line of its docstring
    "What a module is, in one line."
    return (ast.get_docstring(module.tree) or "").partition("\n")[0]
