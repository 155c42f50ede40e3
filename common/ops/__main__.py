from common import ops_check

ops_check.main()
