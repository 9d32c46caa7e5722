# trexe, one process for each action. Usage: sh trexe.sh TREXE...
set -e
for unit in main entry hash total; do
	"$@" --input-path="src/$unit.c:src/$unit.c" --input-path=src/table.h:src/table.h --output-path="$unit.o" \
		--result-metadata-file="$unit.json" @CC@ -O1 -c "src/$unit.c" -o "$unit.o"
done
"$@" --input-path=main.o:main.o --input-path=entry.o:entry.o --input-path=hash.o:hash.o --input-path=total.o:total.o \
	--output-path=program --result-metadata-file=program.json @CC@ -o program main.o entry.o hash.o total.o
