#!/usr/bin/env python3
"""Breaks copies of llmcb.h in one place each and looks whether a test sees it.

    tests/mutants.py [SECTION ...]     MUTANTS=25  that many of each section
    tests/mutants.py ID ...            those, and what each program says

A mutant is one line of the implementation with one thing changed: a
comparison, a number, a condition, && and ||, a sign, a statement left out or
a return in its place. SEED chooses the lines; a mutant's ID comes of its
function, line and change, so it stays the same while that line does.

Each is built with tcc, or with $CC -O0 where tcc cannot, together with the
programs that belong to its section, the quickest first, until one fails or
is not done in time. Who lives is compiled with -O1: no other code than that
of the header as it is, and he is no mutant. Who still lives meets the first
programs of the section as make test builds them, with sanitizers. What is
known to do no harm stands in mutants.known: function, line, what it becomes,
why.

Survivors are in build/mutants/survivors.diff. The status is 1 when less than
95 % (MUTANTS_LEAST) of the others are killed."""

import hashlib, os, re, resource, shutil, signal, subprocess, sys, threading
import time

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
ROOT = os.getcwd()
DIR = os.path.join(ROOT, os.environ.get('MUTANTS_DIR', 'build/mutants'))
WORK = DIR + '/work'
CC = os.environ.get('CC', 'cc')
SEED = os.environ.get('SEED', '1')
COUNT = int(os.environ.get('MUTANTS', '25'))
LEAST = float(os.environ.get('MUTANTS_LEAST', '95'))
SWITCHES = ['-DLLMCB_NO_CURL=']
ASAN = '-fsanitize=address,undefined -fno-sanitize-recover'.split()

# The programs of a section; those before the bar also with sanitizers.
PROGRAMS = {
    'BASE': 'base task | fuzz/clean fuzz/print json wire cases call chat',
    'JSON': 'json | fuzz/json fuzz/chunk wire chat',
    'SSE': 'sse | fuzz/sse chat',
    'TASK': 'task | call chat exec cases agent run tree',
    'RUN': 'run | call chat cases wire faults agent tree scenarios',
    'CALL': 'call cases | chat faults agent run tree kit scenarios walk',
    'HTTP': 'http | fuzz/http fuzz/date fuzz/url faults call chat run '
            'scenarios syscalls',
    'WIRE': 'wire | fuzz/wire fuzz/chunk chat faults cases kit run',
}


# ---- where something can be broken -----------------------------------------

def masked(lines):
    """The lines with comments, strings and directives blanked."""
    out, comment, directive = [], False, False
    for line in lines:
        if directive or line.lstrip().startswith('#'):
            directive = line.endswith('\\')
            out.append('')
            continue
        text, i, quote = [], 0, None
        while i < len(line):
            c, two = line[i], line[i:i + 2]
            if comment:
                if two == '*/':
                    comment, i = False, i + 1
                    text.append(' ')
                text.append(' ')
            elif quote:
                if c == '\\':
                    text.append('_')
                    i += 1
                    c = '_'
                quote = None if c == quote else quote
                text.append(c if not quote else '_')
            elif two == '/*':
                comment, i = True, i + 1
                text.append('  ')
            else:
                quote = c if c in '"\'' else None
                text.append(c)
            i += 1
        out.append(''.join(text).rstrip())
    return out


def live_lines(lines):
    """The numbers of the lines that the preprocessor lets through."""
    out = subprocess.run([CC, '-E', '-I.'] + SWITCHES +
                         ['-x', 'c', '-'], check=True, stdout=subprocess.PIPE,
                         input=b'#define LLMCB_IMPLEMENTATION\n'
                         b'#include "llmcb.h"\n').stdout
    live, at, here = set(), 0, False
    for line in out.decode('utf-8', 'replace').split('\n'):
        m = re.match(r'# (\d+) "([^"]*)"', line)
        if m:
            at, here = int(m.group(1)), m.group(2).endswith('llmcb.h')
            continue
        if here and line.strip():
            live.add(at)
        at += 1
    return live


COMPARE = {'<': ('<=', '>='), '<=': ('<', '>'), '>': ('>=', '<='),
           '>=': ('>', '<'), '==': ('!=',), '!=': ('==',)}
SWAP = {'&&': '||', '||': '&&', '+': '-', '-': '+', '+=': '-=', '-=': '+=',
        '&': '|', '|': '&', '<<': '>>', '>>': '<<', '++': '--', '--': '++',
        'true': 'false', 'false': 'true', '*': '/', '|=': '&=', '&=': '|='}
TYPES = re.compile(r'\s*((static|const|unsigned|struct|union|char|int|bool|void'
                   r'|double|enum|u?int\d+_t|s?size_t|[a-z_]+_t)\b'
                   r'|llmcbi?_\w+ +\**\w+ *[;=,\[])')
NUMBER = re.compile(r'(?<![\w.])(0x[0-9A-Fa-f]+|\d+)(?=[uUlL]*(?![\w.]))')


def closing(text, at):
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == '(') - (text[i] == ')')
        if not depth:
            return i
    return -1


def changes(text, before, gives):
    """(from, to, new text) for all that can be changed in a masked line."""
    found = []
    declares = TYPES.match(text)
    if declares and '[' in text: # how large an array is
        return found
    for m in re.finditer(r' (<=|>=|==|!=|<|>) ', text):
        found += [(m.start(1), m.end(1), c) for c in COMPARE[m.group(1)]]
    for m in re.finditer(r'(?<= )(&&|\|\||[-+|&]=|<<|>>|[-+|&*])(?= |$)'
                         r'|\b(true|false)\b|\+\+|--', text):
        found.append((m.start(), m.end(), SWAP[m.group(0)]))
    for m in re.finditer(r'\b(?:if|while) \(', text):
        end = closing(text, m.end() - 1)
        if end > 0:
            found.append((m.end(), end, ('!(', ')')))
    for m in NUMBER.finditer(text):
        octal = re.match(r'0\d', m.group(1))
        n = int(m.group(1), 8 if octal else 0)
        for v in (n + 1, n - 1):
            if v >= 0:
                found.append((m.start(1), m.end(1),
                              '0%o' % v if octal else str(v)))
    line, start = text.strip(), len(text) - len(text.lstrip())
    whole = (line.endswith(';') and line.count('(') == line.count(')') and
             not declares and
             (before[-1:] in (';', '{', '}', ')', ':') or
              re.search(r'\b(else|do)$', before)))
    if whole and re.match(r'return\b', line):
        if ' ' in line:
            if gives == 'bool':
                found.append((start + 7, len(text) - 1, ('!(', ')')))
            if not re.match(r'return (0|NULL|false|LLMCB_OK|\w+_MORE);', line):
                found.append((start + 7, len(text) - 1, '0'))
    elif whole and not re.match(r'(for|else|do|case|default|goto)\b', line):
        found.append((start, len(text), ';'))
        found.append((start, len(text), 'return;' if gives == 'void'
                      else 'return 0;'))
    return found


class Mutant:
    pass


def hashed(*parts):
    return hashlib.sha1('\0'.join(map(str, parts)).encode()).hexdigest()


def find_mutants():
    """By section, a list of lines of lists of mutants."""
    with open('llmcb.h', encoding='utf-8') as f:
        lines = f.read().split('\n')
    plain, live = masked(lines), live_lines(lines)
    sections, section, function, inside = {}, None, None, False
    gives, seen, before = '', {}, ''
    start = next(i for i, s in enumerate(lines)
                 if s.startswith('#if defined(LLMCB_IMPLEMENTATION) && '
                                 '!defined(LLMCBI_'))
    for i in range(start, len(lines)):
        m = re.match(r'/\* ==== \[([A-Z]+)\]', lines[i])
        if m:
            section = m.group(1)
        text = plain[i]
        if re.match(r'[A-Za-z].*\w\(', text):
            function = re.match(r'[^(]*?(\w+)\(', text).group(1)
            gives = re.match(r'(?:static |LLMCBI_DEF |inline )*(\w* ?)\w',
                             text).group(1).strip()
        if text == '{':
            inside = function is not None
        elif text.startswith('}'):
            inside, function = False, None
        elif inside and text and i + 1 in live and 'ASSERT' not in text:
            key = (function, lines[i].strip())
            seen[key] = seen.get(key, 0) + 1
            here = []
            for a, b, new in changes(text, before, gives):
                m = Mutant()
                old = lines[i]
                if isinstance(new, tuple):
                    new = new[0] + old[a:b] + new[1]
                m.section, m.function, m.line = section, function, i
                m.old, m.new = old, old[:a] + new + old[b:]
                m.id = hashed(function, old.strip(), seen[key], a, b, new)[:8]
                here.append(m)
            if here:
                here.sort(key=lambda m: hashed(SEED, m.id))
                order = hashed(SEED, function, old.strip(), seen[key])
                sections.setdefault(section, []).append((order, here))
        if text:
            before = text
    for s in sections:
        sections[s] = [here for _, here in
                       sorted(sections[s], key=lambda x: x[0])]
    return lines, sections


# ---- build and run ---------------------------------------------------------

def bounded(limit, memory):
    def prepare():
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    return prepare


def run(argv, limit, memory=0):
    """What it printed up to the first failure, and its status or None."""
    p = subprocess.Popen(argv, cwd=WORK, stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         preexec_fn=bounded(limit, memory))

    def stop():
        try:
            os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    late = threading.Timer(limit, stop)
    late.start()
    said = []
    for line in p.stdout:
        said.append(line.decode('utf-8', 'replace').rstrip())
        if said[-1].startswith('  FAILED'):
            stop()
            break
        del said[:-50]
    status = p.wait()
    timed_out = not late.is_alive()
    late.cancel()
    stop() # what it has left behind
    p.stdout.close()
    return None if timed_out else status, said


class Program:
    def __init__(self, name):
        self.name, self.seconds, self.limit = name, 0.0, 60
        self.exe = '%s/%s' % (DIR, name.replace('/', '_'))
        self.args, self.extra = [], []
        if name.startswith('fuzz/'):
            self.source = 'tests/%s.c' % name
            for d in ('corpus', 'finds'):
                at = 'tests/fuzz/%s/%s' % (d, name[5:])
                if os.path.isdir(at):
                    self.args += [at + '/' + f for f in sorted(os.listdir(at))]
            return
        self.source = 'tests/test_%s.c' % name
        with open(self.source) as f:
            m = re.search(r'^/\* build: (.*) \*/$', f.read(), re.M)
        self.extra = m.group(1).split() if m else []

    def main_for_tcc(self):
        """tcc has no constructors, by which tests register themselves."""
        out = subprocess.run(['tcc', '-E', '-I.'] + SWITCHES + [self.source],
                             stdout=subprocess.PIPE, cwd=WORK).stdout
        tests = re.findall(r'static void (test_register_\w+)\(void\)',
                           out.decode())
        self.tcc_source = '%s/main_%s.c' % (WORK, self.name)
        with open(self.tcc_source, 'w') as f:
            f.write('#define main test_main_of_its_own\n#include "%s"\n'
                    '#undef main\nint main(int argc, char **argv)\n{\n%s'
                    '    return test_main(argc, argv);\n}\n' %
                    (self.source, ''.join('    %s();\n' % t for t in tests)))

    def build(self, how):
        """What the compiler says, or None."""
        source = self.source
        if how == 'tcc':
            if not self.name.startswith('fuzz/'):
                if not hasattr(self, 'tcc_source'):
                    self.main_for_tcc()
                source = self.tcc_source
            cmd = ['tcc']
        elif how == 'plain':
            cmd = [CC, '-O0']
        else:
            cmd = [CC] + ASAN
        if os.path.exists(self.exe):
            os.unlink(self.exe)
        status, said = run(cmd + ['-w', '-I.'] + SWITCHES +
                           ['-o', self.exe, source, '-lpthread'] + self.extra,
                           300)
        return None if status == 0 else '\n'.join(said) or 'no compiler'

    def fails(self, sanitized=False):
        """How it fails, or None."""
        status, said = run([self.exe] + self.args,
                           self.limit * (4 if sanitized else 1),
                           0 if sanitized else 4 << 30)
        if status == 0:
            return None
        why = [s for s in said if 'FAILED' in s or 'broken:' in s or
               'ERROR' in s or 'runtime error' in s]
        return '%s: %s' % (self.name, 'not done in time' if status is None
                           else why[0].strip() if why
                           else 'status %d' % status)


def prepare():
    """A place of its own for the header, next to copies of the tests."""
    shutil.rmtree(DIR, ignore_errors=True)
    os.makedirs(WORK + '/build')
    skip = shutil.ignore_patterns('fixtures', 'corpus', 'finds', 'bench',
                                  'model')
    shutil.copytree('tests', WORK + '/tests', ignore=skip)
    for d in ('tests/fixtures', 'tests/fuzz/corpus', 'tests/fuzz/finds',
              'examples'):
        os.symlink(os.path.join(ROOT, d), os.path.join(WORK, d))
    with open(WORK + '/impl.c', 'w') as f:
        f.write('#define LLMCB_IMPLEMENTATION\n#include "llmcb.h"\n')


def write_header(lines):
    with open(WORK + '/llmcb.h', 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines))


def code_of_header():
    status, said = run([CC, '-O1', '-w', '-I.', '-c', '-o', 'impl.o', 'impl.c',
                        '-DLLMCB_NO_CURL'], 300)
    if status != 0:
        return None
    with open(WORK + '/impl.o', 'rb') as f:
        return f.read()


def known():
    found = {}
    if os.path.exists('tests/mutants.known'):
        with open('tests/mutants.known', encoding='utf-8') as f:
            for line in f:
                if line.strip() and not line.startswith('#'):
                    function, old, new, why = line.rstrip('\n').split('\t')
                    found[function, old, new] = why
    return found


def try_mutant(m, programs, original, tell):
    """killed, broken, same or survived, and by what."""
    by_tcc = None
    for p in programs:
        bad = p.build(p.quick)
        if bad:
            return 'broken', bad.split('\n')[0]
        bad = p.fails()
        if bad:
            by_tcc = by_tcc or bad
            if not tell:
                return 'killed', bad
            print('    ' + bad)
    if by_tcc:
        return 'killed', by_tcc
    code = code_of_header()
    if code is None:
        return 'broken', 'does not compile with -O1'
    if code == original:
        return 'same', ''
    for name in PROGRAMS[m.section].split('|')[0].split():
        p = next(p for p in programs if p.name == name)
        bad = p.build('asan')
        if bad:
            return 'broken', bad.split('\n')[0]
        bad = p.fails(True)
        if bad:
            return 'killed', 'sanitized ' + bad
    return 'survived', ''


def main():
    lines, sections = find_mutants()
    wanted = [a for a in sys.argv[1:] if a in PROGRAMS]
    ids = [a for a in sys.argv[1:] if a not in PROGRAMS]
    chosen = []
    if ids:
        chosen = [m for s in PROGRAMS for line in sections[s] for m in line
                  if m.id in ids]
    else:
        for s in wanted or PROGRAMS:
            chosen += [here[0] for here in sections[s][:COUNT]]
    if not chosen:
        print('mutants: there is none of that name')
        return 1
    prepare()
    write_header(lines)
    programs = {}
    for s in sorted(set(m.section for m in chosen)):
        for name in PROGRAMS[s].replace('|', ' ').split():
            if name not in programs:
                programs[name] = p = Program(name)
                begin = time.time()
                # the coroutines of the walk are for gcc and clang
                p.quick = ('tcc' if shutil.which('tcc') and name != 'walk'
                           else 'plain')
                bad = p.build(p.quick)
                if bad and p.quick == 'tcc':
                    p.quick = 'plain'
                    bad = p.build(p.quick)
                bad = bad or p.fails()
                if bad:
                    print('mutants: without a mutant %s: %s' % (name, bad))
                    return 1
                p.seconds = time.time() - begin
                # the machine may have more to do than this
                p.limit = int(10 + 10 * p.seconds)
    original = code_of_header()
    harmless = known()
    counts = {}
    diff = open(DIR + '/survivors.diff', 'w', encoding='utf-8')
    for m in chosen:
        mine = sorted((programs[n] for n in
                       PROGRAMS[m.section].replace('|', ' ').split()),
                      key=lambda p: p.seconds)
        text = '%s [%s] %s, line %d\n-%s\n+%s\n' % (
            m.id, m.section, m.function, m.line + 1, m.old, m.new)
        if ids:
            print(text, end='')
        begin = time.time()
        why = harmless.get((m.function, m.old.strip(), m.new.strip()))
        if why:
            kind = 'known'
        else:
            changed = list(lines)
            changed[m.line] = m.new
            write_header(changed)
            kind, why = try_mutant(m, mine, original, bool(ids))
        counts.setdefault(m.section, []).append(kind)
        print('%-8s %s [%s] %s, %.1f s: %s' % (
            kind, m.id, m.section, m.function, time.time() - begin, why),
            flush=True)
        if kind == 'survived':
            diff.write(text + '\n')
            if not ids:
                print(text, end='', flush=True)
    diff.close()
    total = sum(counts.values(), [])
    for s in counts:
        print('[%s] %s' % (s, ', '.join(
            '%d %s' % (counts[s].count(k), k) for k in
            ('killed', 'survived', 'same', 'known', 'broken'))))
    killed, survived = total.count('killed'), total.count('survived')
    rate = 100.0 * killed / max(1, killed + survived)
    print('mutants: %d killed, %d survived (%.1f %%), %d with the same code, '
          '%d known to be harmless, %d not compiling; seed %s' % (
              killed, survived, rate, total.count('same'),
              total.count('known'), total.count('broken'), SEED))
    return 0 if ids or rate >= LEAST else 1


if __name__ == '__main__':
    sys.exit(main())
