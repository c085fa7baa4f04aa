"""check_install.py CMAKE BUILD CC: install BUILD, move the tree, and use libmla from there as a stranger would.

Compiles the header alone as C11, C17 and C++17; builds a small program by pkg-config (shared and static) and by
find_package; runs each; and looks for paths that would tie the tree to where it was installed."""
import os
import re
import shutil
import subprocess
import sys
import tempfile

cmake, build, cc = sys.argv[1:]
PROGRAM = """#include <mla.h>
#include <stdio.h>
int main(void)
{
    mla_options o;
    mla_error e;
    mla_client *c;
    mla_options_init(&o);
    o.socket = "/nonexistent/mlad";
    o.device = "cpu";
    o.reconnect_ms = 0;
    printf("%s %s\\n", mla_version(), mla_status_text(mla_connect(&c, &o, &e)));
    return 0;
}
"""
LISTS = """cmake_minimum_required(VERSION 3.25)
project(stranger LANGUAGES C)
find_package(mlad 0.1 REQUIRED)
add_executable(shared program.c)
target_link_libraries(shared PRIVATE mlad::mla)
add_executable(static program.c)
target_link_libraries(static PRIVATE mlad::mla_static)
"""


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def find(root, name):
    for folder, _, files in os.walk(root):
        if name in files:
            return folder
    sys.exit(f"{name} was not installed")


def expect(output):
    assert output == "0.1.0 not_connected\n", output


with tempfile.TemporaryDirectory(prefix="mla-install-") as top:
    first, prefix = os.path.join(top, "first"), os.path.join(top, "moved here")
    run(cmake, "--install", build, "--prefix", first, "--component", "libmla")
    shutil.move(first, prefix)
    libdir = find(prefix, "libmla.so.0")
    for folder, _, files in os.walk(prefix):
        for name in files:
            if name.endswith((".pc", ".cmake", ".h")):
                with open(os.path.join(folder, name)) as file:
                    text = file.read()
                assert first not in text and build not in text, f"{name} names where it was built or installed"
    with open(os.path.join(find(prefix, "mla.h"), "mla.h")) as file:
        for function in re.findall(r"^MLA_API [^;(]*?\b(\w+)\(", file.read(), re.M):
            find(prefix, function + ".3")

    program = os.path.join(top, "program.c")
    with open(program, "w") as file:
        file.write(PROGRAM)
    header = os.path.join(find(prefix, "mla.h"), "mla.h")
    strict = ["-fsyntax-only", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror", "-x"]
    for language, standard in (("c", "c11"), ("c", "c17"), ("c++", "c++17")):
        run(cc if language == "c" else "c++", *strict, language, f"-std={standard}", header)

    # pkg-config writes a blank in a path as "\ ", for a shell
    environment = {**os.environ, "PKG_CONFIG_PATH": find(prefix, "libmla.pc"), "CC": cc, "PROGRAM": program,
                   "LD_LIBRARY_PATH": libdir}
    assert run("pkg-config", "--modversion", "libmla", env=environment) == "0.1.0\n"
    for flags, link in (("", ""), ("--static", "-static")):
        out = os.path.join(top, "by-pkg-config" + link)
        script = f'eval "$CC" \'"$PROGRAM"\' -o "{out}" {link} $(pkg-config {flags} --cflags --libs libmla)'
        run("sh", "-c", script, env=environment)
        expect(run(out, env=environment))

    with open(os.path.join(top, "CMakeLists.txt"), "w") as file:
        file.write(LISTS)
    run(cmake, "-S", top, "-B", os.path.join(top, "b"), f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_C_COMPILER={cc}")
    run(cmake, "--build", os.path.join(top, "b"))
    expect(run(os.path.join(top, "b", "shared")))
    expect(run(os.path.join(top, "b", "static")))
print("ok")
