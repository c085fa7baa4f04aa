# Tests of mlad-worker.
add_executable(test_worker_units test_worker_units.c)
target_link_libraries(test_worker_units PRIVATE mladworker mladcommon mlap mlak PkgConfig::CMOCKA)
target_link_options(test_worker_units PRIVATE -Wl,--wrap=malloc -Wl,--wrap=calloc)
add_test(NAME daemon.worker_units COMMAND test_worker_units)
set_tests_properties(daemon.worker_units PROPERTIES LABELS unit TIMEOUT 60)

add_executable(test_scheduler test_scheduler.c)
target_link_libraries(test_scheduler PRIVATE mladworker mladcommon mlap mlak PkgConfig::CMOCKA)
add_test(NAME daemon.scheduler COMMAND test_scheduler)
set_tests_properties(daemon.scheduler PROPERTIES LABELS unit TIMEOUT 60)

# Behaviours of the running process, on the device that each is best seen on: reference is slow enough to watch.
function(add_worker_test test device)
  foreach(behaviour ${ARGN})
    add_test(NAME daemon.worker_${behaviour}.${device}
             COMMAND ${MLAD_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/${test}.py $<TARGET_FILE:mlad-worker> ${device}
                     ${behaviour})
    set_tests_properties(daemon.worker_${behaviour}.${device} PROPERTIES LABELS process TIMEOUT 120
      ENVIRONMENT PYTHONDONTWRITEBYTECODE=1)
  endforeach()
endfunction()
add_worker_test(test_worker cpu decodes_in_place computes_attention big_batches_run_in_slices
  refusals_name_their_field outputs_never_overlap_inputs content_errors_are_named
  broken_messages_end_only_their_session unusable_memory_is_refused quotas_are_per_user
  client_that_never_reads_is_dropped clients_share_launches
  dependent_decodes_run_in_order clients_that_die_in_company_harm_nobody)
add_worker_test(test_worker reference decodes_in_place computes_attention big_batches_run_in_slices
  content_errors_are_named too_much_in_flight_is_busy a_session_leaves_room_for_others_of_its_user
  flood_does_not_starve_others clients_share_launches clients_that_die_in_company_harm_nobody)
add_worker_test(test_worker_rings cpu decodes_by_the_rings rings_are_made_only_for_who_asks failures_come_by_the_socket
  bad_entries_are_refused_by_sequence nonsense_ends_only_its_session entries_come_before_datagrams
  completions_are_not_lost_when_the_ring_is_full knocking_is_harmless rewritten_entries_are_read_once
  drained_device_refuses_entries dead_ring_clients_leave_nothing)
add_worker_test(test_worker_rings reference decodes_by_the_rings too_many_entries_are_busy
  ended_session_drops_what_it_pushed)
add_worker_test(test_worker_lives cpu sessions_are_listed_in_pages held_lock_delays_ready
  unservable_device_is_explained control_faults_are_answered freeing_big_memory_stops_nobody)
add_worker_test(test_worker_lives reference ids_are_reused_and_work_in_flight_completes dead_clients_leave_nothing
  ended_session_drains drain_waits_and_refuses evicted_session_hears_why control_end_ends_it_in_mid_launch
  beat_and_progress_grow)
