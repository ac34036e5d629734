"""What people ask about the standard library, in their words, each with the object whose docstring answers it.

The expected name only shows that the model does something useful (its fault-free accuracy is printed). A *wrong
answer* in the demo is something else: an answer that differs from the one the same model gives without faults.
"""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    text: str
    expected: str


_PAIRS = """
how do I find the position where an element would be inserted into a sorted list | bisect.bisect
put a value into a list that is already in order without breaking the order | bisect.insort
which function tells me whether a year has 29 days in February | calendar.isleap
what day of the week was a given date | calendar.weekday
count how often each word occurs | collections.Counter
a dictionary that keeps the order in which keys were inserted | collections.OrderedDict
look up a name in several dictionaries as if they were one | collections.ChainMap
how can I give names to the fields of a tuple | collections.namedtuple
add something to the left end of a double ended queue | collections.deque.appendleft
rotate the elements of a queue by a few steps | collections.deque.rotate
send everything that is printed into a file for a while | contextlib.redirect_stdout
ignore certain exceptions in a block of code | contextlib.suppress
temporarily change the working directory | contextlib.chdir
clone an object together with everything it contains | copy.deepcopy
guess the delimiter of a comma separated file | csv.Sniffer
turn a dataclass instance into a dictionary | dataclasses.asdict
create a new dataclass at run time | dataclasses.make_dataclass
the difference between two points in time | datetime.timedelta
suggest the most similar words for a misspelled one | difflib.get_close_matches
show the changes between two versions of a text | difflib.unified_diff
does a file name match a shell style pattern | fnmatch.fnmatch
convert a wildcard pattern into a regular expression | fnmatch.translate
calculate exactly with rational numbers | fractions.Fraction
remember the results of a function so that it is not computed twice | functools.cache
fix some of the arguments of a function | functools.partial
ask the user for a password without showing it on the screen | getpass.getpass
which user is logged in | getpass.getuser
list all files whose path fits a pattern | glob.glob
shrink bytes with gzip in a single call | gzip.compress
compute the SHA-256 digest of some data | hashlib.sha256
take the smallest item from a heap | heapq.heappop
get the ten largest values of a collection | heapq.nlargest
turn a list into a heap in linear time | heapq.heapify
merge several sorted sequences into one | heapq.merge
make a string safe to be shown in a web page | html.escape
treat a piece of text in memory as a file | io.StringIO
parse an internet address from a string | ipaddress.ip_address
running totals of a series of numbers | itertools.accumulate
all ways to choose three elements out of ten | itertools.combinations
repeat a sequence over and over without end | itertools.cycle
walk over neighbouring pairs of a sequence | itertools.pairwise
split an iterator into several independent ones | itertools.tee
stop reading a sequence as soon as a condition fails | itertools.takewhile
read JSON from a file | json.load
convert an object to a JSON text | json.dumps
the greatest number that divides all of these | math.gcd
the straight line distance between two points | math.dist
are two floating point numbers nearly equal | math.isclose
convert an angle from degrees to radians | math.radians
the integer part of a square root | math.isqrt
sum up floating point numbers without losing precision | math.fsum
in how many ways can I pick k of n things when the order does not matter | math.comb
find out the content type of a file from its name | mimetypes.guess_type
the last part of a path | os.path.basename
how large is this file in bytes | os.path.getsize
when was this file last modified | os.path.getmtime
replace the tilde in a path by the home directory | os.path.expanduser
split the extension off a file name | os.path.splitext
do these two paths point to the same file | os.path.samefile
create a directory with pathlib | pathlib.Path.mkdir
delete a file | pathlib.Path.unlink
search a folder and all its subfolders for files with a certain name | pathlib.Path.rglob
read a whole text file into a string | pathlib.Path.read_text
store a Python object as bytes | pickle.dumps
print nested data in a readable way | pprint.pprint
a queue that gives back the newest item first | queue.LifoQueue
shuffle a list at random | random.shuffle
draw a random integer between two bounds | random.randint
pick one random element of a list | random.choice
take a random sample of the population without replacement | random.sample
replace every match of a regular expression | re.sub
escape the special characters of a regular expression | re.escape
generate a secure random token for a link | secrets.token_urlsafe
split a command line the way the shell does | shlex.split
copy a file together with its metadata | shutil.copy2
delete a directory and everything inside it | shutil.rmtree
how much free space is left on the disk | shutil.disk_usage
where is the program that this command would start | shutil.which
the middle value of a data set | statistics.median
how strongly are two variables related | statistics.correlation
fit a straight line through some data | statistics.linear_regression
the most frequent value | statistics.mode
the standard deviation of a sample | statistics.stdev
run a program and get what it printed | subprocess.check_output
a directory that disappears when I am done with it | tempfile.TemporaryDirectory
remove the common indentation of a block of text | textwrap.dedent
break a long paragraph into lines | textwrap.wrap
run a function after a delay of some seconds | threading.Timer
how many threads are alive right now | threading.active_count
measure how long a small piece of code takes | timeit.timeit
the current exception and its stack as a string | traceback.format_exc
the official name of a unicode character | unicodedata.name
build a query string for a URL from a dictionary | urllib.parse.urlencode
make a relative link absolute | urllib.parse.urljoin
make a random unique identifier | uuid.uuid4
silence a certain kind of warning | warnings.simplefilter
open a page in the user's browser | webbrowser.open
is this file a zip archive | zipfile.is_zipfile
a cheap checksum of some bytes | zlib.crc32
sort a list in place | builtins.list.sort
remove white space from both ends of a string | builtins.str.strip
the elements that two sets have in common | builtins.set.intersection
get the value of a key or a default if the key is missing | builtins.dict.get
loop over a list together with the index | builtins.enumerate
"""

QUESTIONS = tuple(Question(*(part.strip() for part in line.split("|"))) for line in _PAIRS.strip().splitlines())
