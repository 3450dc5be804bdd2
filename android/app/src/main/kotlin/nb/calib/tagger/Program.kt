package nb.calib.tagger

import java.nio.ByteBuffer
import java.nio.ByteOrder

/** What a tagger's program says of itself: categories, side of the input in pixels, ratio of the crop. */
class TaggerSpec(val model: String, val classes: List<String>, val size: Int, val crop: Double)

/**
 * What stands in an ExecuTorch program (.pte), read without the native library, so that a wrong file is a sentence
 * and no crash. The layout is executorch/schema/program.fbs, a FlatBuffers file "ET12".
 */
class Program private constructor(
    val methods: List<String>,
    /** Shape of the first input of `forward`. */
    val input: List<Int>,
    /** Identifiers of the delegates of `forward`, each once. */
    val delegates: List<String>,
    private val notes: String?,
) {
    /** The tagger's own notes; [Fault.NOT_A_TAGGER] when there are none or they do not fit the input. */
    fun spec(): TaggerSpec {
        try {
            val map = Json.read((Json.read(notes!!) as Map<*, *>)["tagger"] as String) as Map<*, *>
            val classes = (map["classes"] as List<*>).map { it as String }
            val size = (map["size"] as Double).toInt()
            if (input != listOf(1, 3, size, size)) throw Refusal(Fault.NOT_A_TAGGER, "input $input, size $size")
            return TaggerSpec(map["model"] as String, classes, size, map["crop"] as Double)
        } catch (e: RuntimeException) {
            throw Refusal(Fault.NOT_A_TAGGER, "no notes of calib-nb in it", e)
        }
    }

    companion object {
        private const val STRING = 6 // number of String in the union KernelTypes
        private const val TENSOR = 5

        /** Reads a whole file. Throws [Refusal]: NOT_A_PROGRAM or TRUNCATED. */
        fun read(file: ByteBuffer): Program {
            val data = file.duplicate().order(ByteOrder.LITTLE_ENDIAN)
            if (data.limit() < 8 || text(data, 4, 4) != "ET12") throw Refusal(Fault.NOT_A_PROGRAM, "no ET12 in its head")
            try {
                val wanted = wholeSize(data)
                if (data.limit() < wanted) throw Refusal(Fault.TRUNCATED, "${data.limit()} of $wanted bytes")
                return tables(data)
            } catch (e: RuntimeException) {
                throw Refusal(Fault.NOT_A_PROGRAM, e.javaClass.simpleName, e)
            }
        }

        /** Bytes that the file must have, by its extended header; 0 where there is none. */
        private fun wholeSize(data: ByteBuffer): Long {
            if (data.limit() < 32 || text(data, 8, 4) != "eh00") return 0
            val length = data.getInt(12)
            val program = data.getLong(16)
            val base = data.getLong(24)
            val segments = if (length >= 32 && data.limit() >= 40) data.getLong(32) else 0L
            return if (base == 0L) program else base + segments
        }

        private fun tables(data: ByteBuffer): Program {
            val plans = Table(data, data.getInt(0)).tables(1)
            val forward = plans.firstOrNull { it.string(0) == "forward" }
                ?: throw Refusal(Fault.NOT_A_PROGRAM, "no method forward")
            val first = forward.ints(3).firstOrNull() ?: throw Refusal(Fault.NOT_A_TAGGER, "forward takes no input")
            val value = forward.tables(2)[first]
            if (value.byte(0) != TENSOR) throw Refusal(Fault.NOT_A_TAGGER, "the input is no tensor")
            val delegates = forward.tables(7).map { it.string(0) }.distinct()
            return Program(plans.map { it.string(0) }, value.table(1).ints(2), delegates, notes(plans))
        }

        private fun notes(plans: List<Table>): String? {
            val plan = plans.firstOrNull { it.string(0) == "notes" } ?: return null
            val value = plan.tables(2)[plan.ints(4)[0]]
            return if (value.byte(0) == STRING) value.table(1).string(0) else null
        }

        private fun text(data: ByteBuffer, at: Int, length: Int): String {
            if (length < 0 || length > data.limit() - at) throw IndexOutOfBoundsException("text of $length bytes")
            val bytes = ByteArray(length)
            for (k in 0 until length) bytes[k] = data.get(at + k)
            return String(bytes, Charsets.UTF_8)
        }
    }

    /** A FlatBuffers table at [at]; each read checks its bounds (java.nio throws). */
    private class Table(private val data: ByteBuffer, private val at: Int) {
        private val vtable = at - data.getInt(at)

        private fun field(k: Int): Int {
            val slot = 4 + 2 * k
            val offset = if (slot < data.getShort(vtable).toInt() and 0xffff) data.getShort(vtable + slot).toInt() else 0
            return if (offset == 0) 0 else at + (offset and 0xffff)
        }

        private fun target(k: Int): Int = field(k).let { if (it == 0) 0 else it + data.getInt(it) }

        fun byte(k: Int): Int = field(k).let { if (it == 0) 0 else data.get(it).toInt() }

        fun table(k: Int) = Table(data, target(k))

        fun string(k: Int): String = target(k).let { if (it == 0) "" else text(data, it + 4, data.getInt(it)) }

        fun ints(k: Int): List<Int> = vector(k) { data.getInt(it) }

        fun tables(k: Int): List<Table> = vector(k) { Table(data, it + data.getInt(it)) }

        private fun <T> vector(k: Int, item: (Int) -> T): List<T> {
            val start = target(k)
            val length = if (start == 0) 0 else data.getInt(start)
            if (length < 0 || length > data.limit() / 4) throw IndexOutOfBoundsException("$length items")
            return List(length) { item(start + 4 + 4 * it) }
        }
    }
}
