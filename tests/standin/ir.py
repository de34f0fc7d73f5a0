"""Watch a kernel: rules checked and hooks inserted in clang's unoptimised LLVM text.

With clang's "fake" address-space map the intermediate code still says which memory each access goes to:
addrspace(1) is device, (3) threadgroup, (2) constant, (4) unknown, none is private. So hooks go exactly where
the source reads or writes shared memory, before the optimiser can merge anything, and private variables cost
nothing. Afterwards the address spaces are erased and the text is ordinary x86 code.
"""

import re

from .errors import MetalCompileError

_SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
_ACCESS = re.compile(
    r"^  (?:%\S+ = load (?:volatile )?(?P<load>.+?), |store (?:volatile )?(?P<store>.+)(?<!\() )?"
    r"ptr addrspace\((?P<space>[1-4])\) (?P<address>[^\s,]+|[a-z]+ .*?\)), align (?P<align>\d+)(?P<rest>.*)$"
)
_COPY = re.compile(
    r"^  call void @llvm\.mem(cpy|move|set)\.p(\d)(?:\.p(\d))?\.i64\((.*)\)(?: #\d+)?(?:, !dbg !(\d+))?"
)
_DBG = re.compile(r"!dbg !(\d+)")
_MAC = re.compile(r"^  %\S+ = (?:fmul|(?:tail )?call \S* ?.*@llvm\.(?:fma|fmuladd)\.)")


def _size(kind):
    kind = kind.strip()
    if m := re.fullmatch(r"<(\d+) x (.+)>", kind):
        return int(m.group(1)) * _size(m.group(2))
    if m := re.fullmatch(r"\[(\d+) x (.+)\]", kind):
        return int(m.group(1)) * _size(m.group(2))
    if m := re.fullmatch(r"i(\d+)", kind):
        return (int(m.group(1)) + 7) // 8
    if kind.startswith("ptr"):
        return 8
    if kind in _SIZES:
        return _SIZES[kind]
    raise MetalCompileError(f"the stand-in cannot watch an access of type {kind}")


class _Places:
    """Debug metadata: which line and column an instruction comes from, if from the kernel's own source."""

    def __init__(self, text):
        self.nodes = dict(re.findall(r"^!(\d+) = (?:distinct )?(!DI\w+\(.*\))$", text, re.M))
        self.cache = {}

    def file_of(self, node, depth=0):
        body = self.nodes.get(node, "")
        if m := re.match(r'!DIFile\(filename: "([^"]*)"', body):
            return m.group(1)
        m = re.search(r"\bfile: !(\d+)", body) or re.search(r"\bscope: !(\d+)", body)
        return self.file_of(m.group(1), depth + 1) if m and depth < 20 else ""

    def site(self, node):
        if node not in self.cache:
            body = self.nodes.get(node, "")
            while "line: 0" in body and (m := re.search(r"inlinedAt: (?:distinct )?!(\d+)", body)):
                body = self.nodes.get(m.group(1), "")
            line = re.search(r"line: (\d+)", body)
            column = re.search(r"column: (\d+)", body)
            own = self.file_of(node).endswith("kernel.metal")
            self.cache[node] = (
                (int(line.group(1)) << 10 | min(int(column.group(1)) if column else 0, 1023))
                if own and line
                else 0
            )
        return self.cache[node]


def _functions(text):
    """(name, header line, body) of every function defined in the text."""
    return re.findall(r"^(define [^\n]*?@(\"[^\"]+\"|[\w.$]+)\([^\n]*)\{\n(.*?)^\}", text, re.M | re.S)


def check(text):
    """What Metal's compiler rejects and clang's OpenCL mode lets pass: unqualified pointers, recursion."""
    places = _Places(text)
    calls = {}
    for header, name, body in _functions(text):
        calls[name] = set(re.findall(r"call [^\n]*?@(\"[^\"]+\"|[\w.$]+)\(", body))
        place = _DBG.search(header)
        if not place or not places.site(place.group(1)):
            continue
        for variable in re.findall(r"^  %([\w.]+) = alloca ptr addrspace\(4\)", body, re.M):
            variable = variable.removesuffix(".addr")
            if variable and not re.match(r"this$|ref\.tmp|agg\.tmp|tmp|retval|__range", variable):
                line = places.site(place.group(1)) >> 10
                raise MetalCompileError(
                    f"kernel.metal:{line}: `{variable}` is a pointer or reference without an address space "
                    "(device, threadgroup, constant or thread)"
                )
    done = set()

    def visit(name, path):
        if name in path:
            raise MetalCompileError(f"recursion is not allowed in Metal: {' -> '.join([*path, name])}")
        if name in calls and name not in done:
            for callee in calls[name]:
                visit(callee, [*path, name])
            done.add(name)

    for name in calls:
        visit(name, [])


def _watch(body, places):
    """One function's text with hooks before accesses to shared memory, and a count of scalar products."""
    out, block_start, macs, serial = [], None, 0, 0

    def finish_block():
        nonlocal macs, block_start
        if macs and block_start is not None:
            n = f"%msl.m{block_start}"
            out[block_start:block_start] = [
                f"  {n} = load i64, ptr @msl_scalar_macs, align 8",
                f"  {n}.n = add i64 {n}, {macs}",
                f"  store i64 {n}.n, ptr @msl_scalar_macs, align 8",
            ]
        macs, block_start = 0, None

    for line in body.split("\n"):
        if line and not line.startswith(" "):  # a label: a new basic block
            finish_block()
        elif (
            block_start is None and line.startswith("  ") and " = phi " not in line and " alloca " not in line
        ):
            block_start = len(out)
        place = _DBG.search(line)
        site = places.site(place.group(1)) if place else 0
        debug = f", !dbg !{place.group(1)}" if place else ""
        if "addrspace(" in line and (m := _ACCESS.match(line)) and (m.group("load") or m.group("store")):
            write = m.group("store") is not None
            kind = m.group("load") or _stored_type(m.group("store"))
            hook = "msl_write" if write else "msl_read"
            packed = _size(kind) << 8 | int(m.group("align"))
            space, address = m.group("space"), f"ptr addrspace({m.group('space')}) {m.group('address')}"
            out.append(f"  %msl.a{serial} = ptrtoint {address} to i64")
            out.append(
                f"  call void @{hook}(i32 {space}, i64 %msl.a{serial}, i32 {packed}, i32 {site}){debug}"
            )
            serial += 1
        elif "@llvm.mem" in line and (m := _COPY.match(line)):
            for address, space, hook, size, align in _copied(m):
                out.append(f"  %msl.a{serial} = ptrtoint ptr addrspace({space}) {address} to i64")
                packed = size << 8 | align
                out.append(
                    f"  call void @{hook}(i32 {space}, i64 %msl.a{serial}, i32 {packed}, i32 {site}){debug}"
                )
                serial += 1
        elif "@llvm.ubsantrap(" in line:
            kind = re.search(r"i8 (\d+)", line).group(1)
            line = f"  call void @msl_trap(i32 {kind}, i32 {site}){debug}"
        elif "fm" in line and _MAC.match(line):
            width = re.search(r"<(\d+) x ", line)
            macs += int(width.group(1)) if width else 1
        out.append(line)
    finish_block()
    return "\n".join(out)


def _stored_type(text):
    """`<2 x half> %x,` -> `<2 x half>`."""
    if m := re.match(r"(<[^>]*>|\[[^\]]*\]|ptr(?: addrspace\(\d\))?|\w+) ", text):
        return m.group(1)
    raise MetalCompileError(f"the stand-in cannot watch the store {text}")


def _copied(m):
    """The shared-memory ends of an llvm.memcpy or memset."""
    arguments = re.split(r", (?=ptr|i\d)", m.group(4))
    size = int(re.search(r"(\d+)$", arguments[2]).group(1))
    ends = [(arguments[0], "msl_write")] + ([] if m.group(1) == "set" else [(arguments[1], "msl_read")])
    for text, hook in ends:
        if p := re.match(r"ptr addrspace\((\d)\) (?:\w+ )*?(?:align (\d+) )?(?:[\w()]+ )*?([%@]\S+)$", text):
            yield p.group(3), p.group(1), hook, size, int(p.group(2) or 1)


def instrument(text):
    """Insert the hooks into every function but the wrapper."""
    places = _Places(text)

    def one(m):
        if "@msl_entry(" in m.group(1):
            return m.group(0)
        return m.group(1) + _watch(m.group(2), places) + "\n}"

    text = re.sub(r"^(define [^\n]*\{\n)(.*?)\n\}$", one, text, flags=re.M | re.S)
    return text + (
        "\n@msl_scalar_macs = external global i64\n"
        "declare void @msl_read(i32, i64, i32, i32)\ndeclare void @msl_write(i32, i64, i32, i32)\n"
        "declare void @msl_trap(i32, i32)\n"
    )


def erase_address_spaces(text):
    """Plain x86 code: every pointer in the one address space."""
    text = text.replace("addrspacecast", "bitcast")
    text = re.sub(r" addrspace\(\d\)", "", text)
    text = re.sub(r"(@llvm\.\S*?)\.p[1-4]\b", r"\1.p0", text)
    text = re.sub(r"(@llvm\.\S*?)\.p[1-4]\b", r"\1.p0", text)
    text = re.sub(r", !llvm\.loop !\d+", "", text)  # unrolling costs compile time and gains nothing here
    lines, declared = [], set()
    for line in text.split("\n"):
        if line.startswith("declare "):
            name = re.search(r"@[\w.]+", line).group(0)
            if name in declared:
                continue
            declared.add(name)
        lines.append(line)
    return "\n".join(lines)
