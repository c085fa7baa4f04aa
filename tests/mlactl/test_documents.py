"""Manual pages and completion say what the programs say."""
import os
import re
import subprocess

from daemon import MLACTL, MLAD, SOURCE, Daemon, mlactl, run

PAGES = ("mlactl.1", "mlad.8", "mlad.conf.5", "mlad-placements.7")
COMPLETION = os.path.join(SOURCE, "deploy/completion/mlactl")


def page(name):
    return os.path.join(SOURCE, "deploy/man", name)


def rendered(name):
    text = subprocess.run(["man", "-l", "-E", "ascii", page(name)], capture_output=True, text=True, check=True,
                          env=dict(os.environ, MANWIDTH="200", MANPAGER="cat", MAN_KEEP_FORMATTING="")).stdout
    return re.sub(r"\s+", " ", text)


def commands():
    lines = mlactl("help").stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    return [line.split()[0] for line in lines]


def options(*command):
    return set(re.findall(r"--[a-z-]+", "\n".join(line[:24] for line in mlactl("help", *command).stdout.splitlines()
                                                  if line.startswith("  "))))


def pages_have_no_warnings(daemon):
    for name in PAGES:
        result = subprocess.run(["man", "-l", "--warnings", "-E", "UTF-8", page(name)], capture_output=True, text=True,
                                env=dict(os.environ, MANWIDTH="80"))
        assert result.returncode == 0 and result.stderr == "", f"{name}: {result.stderr}"


def mlactl_1_names_every_command_and_option(daemon):
    text = rendered("mlactl.1")
    assert len(commands()) >= 10
    for command in commands():
        assert re.search(rf"\b{command}\b", text), command
        for option in options(command) if command != "help" else ():
            assert option in text, f"{option} of {command}"
    for code in (0, 1, 2, 3, 4, 64):
        assert re.search(rf"^{code}\|", open(page("mlactl.1")).read(), re.M), f"exit code {code}"


def mlad_8_names_every_option(daemon):
    text = rendered("mlad.8")
    help_text = subprocess.run([MLAD, "--help"], capture_output=True, text=True, check=True).stdout
    usage = help_text.split("Options of the file")[0]
    found = set(re.findall(r"--[a-z-]+", usage))
    assert len(found) >= 8
    for option in found:
        assert option in text, option


def mlad_conf_5_has_every_option_with_its_default(daemon):
    text = rendered("mlad.conf.5")
    printed = subprocess.run([MLAD, "--config", "/dev/null", "--print-config"], capture_output=True, text=True,
                             check=True).stdout
    pairs = re.findall(r"^#?([a-z_]+) =[ ]?(.*)$", printed, re.M)
    assert len(pairs) >= 20
    for key, value in pairs:
        assert f" {key} = {value or '(empty)'} " in text, f"{key} = {value}"
    documented = re.findall(r'^\.B "([a-z_]+) = ', open(page("mlad.conf.5")).read(), re.M)
    assert documented == [key for key, _ in pairs], "an option that is gone, or another order"


def complete(daemon, *words):
    script = (f'source "{COMPLETION}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mlactl; '
              'printf "%s\\n" "${COMPREPLY[@]}"')
    environment = dict(os.environ, PATH=os.path.dirname(MLACTL) + ":" + os.environ["PATH"], MLAD_SOCKET=daemon.socket)
    return set(subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True,
                              env=environment).stdout.split())


def completion_knows_commands_options_and_devices(daemon):
    subprocess.run(["bash", "-n", COMPLETION], check=True)
    assert complete(daemon, "mlactl", "") == set(commands())
    assert complete(daemon, "mlactl", "ev") == {"evict"}
    for command in commands():
        if command != "help":
            assert complete(daemon, "mlactl", command, "--") == options(command), command
    assert complete(daemon, "mlactl", "drain", "") == {"cpu", "reference"}
    assert complete(daemon, "mlactl", "--json", "decode", "--device", "r") == {"reference"}
    assert complete(daemon, "mlactl", "verify", "--cases", "") == set()
    assert complete(daemon, "mlactl", "bench", "--tenants", "") == set()
    assert complete(daemon, "mlactl", "bench", "--layers", "3", "t") == {"tenants"}
    assert "ls" in complete(daemon, "mlactl", "run", "l")
    assert "/etc/passwd" in complete(daemon, "mlactl", "run", "--device", "cpu", "ls", "/etc/pass")


def mlad_placements_7_names_every_placement(daemon):
    text = rendered("mlad-placements.7")
    with open(os.path.join(SOURCE, "proto/PROTOCOL.md"), encoding="utf-8") as file:
        section = file.read().split("Placements of a client", 1)[1].split("\n#", 1)[0]
    names = re.findall(r"^\| `([a-z_]+)` \|", section, re.M)
    assert {"shared_mps", "own_gpu", "shared_timesliced", "host"} <= set(names), section
    for name in names:
        assert re.search(rf"\b{name}\b", text), name


if __name__ == "__main__":
    run([pages_have_no_warnings, mlactl_1_names_every_command_and_option, mlad_8_names_every_option,
         mlad_conf_5_has_every_option_with_its_default, completion_knows_commands_options_and_devices,
         mlad_placements_7_names_every_placement], Daemon())
