"""Put what a tool prints between two markers of a page, or with --check only say whether it is there.

usage: update_section.py [--check] PAGE SECTION TARGET TOOL

The markers are lines, <!-- SECTION: begin --> and <!-- SECTION: end -->; TARGET is the build target that runs this."""
import subprocess
import sys


def main(arguments):
    check = arguments[:1] == ["--check"]
    page, section, target, tool = arguments[check:]
    begin, end = f"<!-- {section}: begin -->\n", f"<!-- {section}: end -->\n"
    with open(page, encoding="utf-8") as file:
        old = file.read()
    before, _, rest = old.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{page} has lost its markers {begin.strip()} and {end.strip()}")
    printed = subprocess.run([tool], check=True, stdout=subprocess.PIPE, text=True).stdout
    new = before + begin + "\n" + printed + "\n" + end + after
    if check and new != old:
        sys.exit(f"{page} is out of date with the code; run: cmake --build BUILD --target {target}")
    if new != old:
        with open(page, "w", encoding="utf-8") as file:
            file.write(new)


main(sys.argv[1:])
