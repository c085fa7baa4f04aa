/* The rule that says which placement a client has, and what one process takes from its environment. */
#include "mlap_placement.h"

#include "cmocka_all.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define A "GPU-a"
#define B "GPU-b"

static void the_rule_covers_every_pair_of_places(void **state)
{
    (void)state;
    static const struct {
        struct mlap_place worker, client;
        enum mlap_placement placement;
        const char *why;
    } cases[] = {
        {{"", ""}, {"", ""}, MLAP_placement_HOST, "no GPU"},
        {{"", ""}, {A, "/m"}, MLAP_placement_HOST, "no GPU"},
        {{A, ""}, {"", ""}, MLAP_placement_OWN_GPU, "host memory"},
        {{A, "/m"}, {"", "/m"}, MLAP_placement_OWN_GPU, "host memory"},
        {{A, "/m"}, {B, "/m"}, MLAP_placement_OWN_GPU, B},
        {{A, "/m"}, {A, "/m"}, MLAP_placement_SHARED_MPS, "/m"},
        {{A, ""}, {A, ""}, MLAP_placement_SHARED_TIMESLICED, "the worker is not under MPS"},
        {{A, ""}, {A, "/m"}, MLAP_placement_SHARED_TIMESLICED, "the client is"},
        {{A, "/m"}, {A, ""}, MLAP_placement_SHARED_TIMESLICED, "mlactl run"},
        {{A, "/m"}, {A, "/n"}, MLAP_placement_SHARED_TIMESLICED, "its own"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char why[MLAP_WHY];
        assert_int_equal(mlap_placement_of(&cases[i].worker, &cases[i].client, why), cases[i].placement);
        assert_non_null(strstr(why, cases[i].why));
    }
}

static void the_longest_reason_fits(void **state)
{
    (void)state;
    struct mlap_place worker = {A, ""}, client = {A, "/n"};
    char why[MLAP_WHY];
    memset(worker.mps, 'x', sizeof worker.mps - 1);
    assert_int_equal(mlap_placement_of(&worker, &client, why), MLAP_placement_SHARED_TIMESLICED);
    assert_non_null(strstr(why, "mlactl run"));
}

static void a_clients_word_does_not_reach_a_terminal_as_it_is(void **state)
{
    (void)state;
    const struct mlap_place worker = {A, ""}, client = {"GPU\033[2J\n\xc3\xbc", ""};
    char why[MLAP_WHY];
    assert_int_equal(mlap_placement_of(&worker, &client, why), MLAP_placement_OWN_GPU);
    assert_string_equal(why, "the client works on GPU?[2J???");
}

static void memory_elsewhere_outweighs_kv_on_the_workers_gpu(void **state)
{
    (void)state;
    const struct mlap_place worker = {A, ""};
    struct mlap_place client = {"", ""};
    mlap_place_memory(&client, &worker, A);
    assert_string_equal(client.gpu, A);
    mlap_place_memory(&client, &worker, B);
    assert_string_equal(client.gpu, B);
    mlap_place_memory(&client, &worker, A);
    assert_string_equal(client.gpu, B);
}

static void the_directory_is_the_environments_or_the_drivers(void **state)
{
    (void)state;
    char path[MLAP_MPS], longest[MLAP_MPS + 1];
    unsetenv("CUDA_MPS_PIPE_DIRECTORY");
    assert_true(mlap_mps_directory(path));
    assert_string_equal(path, "/tmp/nvidia-mps");
    setenv("CUDA_MPS_PIPE_DIRECTORY", "/run/mps//", 1);
    assert_true(mlap_mps_directory(path));
    assert_string_equal(path, "/run/mps");
    memset(longest, '/', sizeof longest);
    memset(longest + 1, 'x', sizeof longest - 1);
    longest[MLAP_MPS] = '\0';
    setenv("CUDA_MPS_PIPE_DIRECTORY", longest, 1);
    assert_false(mlap_mps_directory(path));
    setenv("CUDA_MPS_PIPE_DIRECTORY", "/\xff", 1);
    assert_false(mlap_mps_directory(path));
    assert_string_equal(path, "");
}

static void the_driver_decides_and_else_the_control_pipe(void **state)
{
    (void)state;
    char directory[] = "/tmp/mlap-mps-XXXXXX", control[64];
    struct mlap_place place = {"", ""};
    assert_non_null(mkdtemp(directory));
    setenv("CUDA_MPS_PIPE_DIRECTORY", directory, 1);
    mlap_place_mps(&place, -1);
    assert_string_equal(place.mps, "");
    mlap_place_mps(&place, 1);
    assert_string_equal(place.mps, directory);
    snprintf(control, sizeof control, "%s/control", directory);
    assert_int_equal(mkfifo(control, 0600), 0);
    mlap_place_mps(&place, 0);
    assert_string_equal(place.mps, "");
    mlap_place_mps(&place, -1);
    assert_string_equal(place.mps, directory);
    unlink(control);
    rmdir(directory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_rule_covers_every_pair_of_places),
        cmocka_unit_test(the_longest_reason_fits),
        cmocka_unit_test(a_clients_word_does_not_reach_a_terminal_as_it_is),
        cmocka_unit_test(memory_elsewhere_outweighs_kv_on_the_workers_gpu),
        cmocka_unit_test(the_directory_is_the_environments_or_the_drivers),
        cmocka_unit_test(the_driver_decides_and_else_the_control_pipe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
