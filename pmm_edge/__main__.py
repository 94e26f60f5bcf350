from pmm_edge.cli import main

main()
